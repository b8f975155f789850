// RMSNorm of every q and k head of a packed projection, then its rotation, in one pass; and the way back. LANES neighbouring
// threads share a head: each has the two vectors of one unit, N pairs of channels that are rotated into each other, or one
// vector of channels that are not rotated. Any other head takes the same kernels with N = 1 and several units a thread.
#include "common.cuh"

namespace megatronish {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostHeads = 0x7FFFFFFF - kThreads;

template <int VALUE>
struct Number {
  static constexpr int n = VALUE;
};

// Position of this thread's unit in a head.
template <int N, bool INTERLEAVED>
struct Unit {
  int first, second, angle;  // channels of the two vectors; place in the tables
  bool rotated, exists;

  __device__ __forceinline__ Unit(const QkHeads& a, int number) {
    const int half = static_cast<int>(a.half), rotated_units = half / N;
    rotated = number < rotated_units;
    exists = rotated || (number - rotated_units) * N < static_cast<int>(a.head_dim) - 2 * half;
    angle = number * N;
    first = !rotated ? 2 * half + (number - rotated_units) * N : INTERLEAVED ? 2 * number * N : number * N;
    second = INTERLEAVED ? first + N : first + half;
  }
};

template <class T, int N>
struct Values {
  Wide<T> x[N], y[N];  // of `first` and `second`; y is 0 where the unit is not rotated

  template <class W>
  __device__ __forceinline__ void read(const W* head, int first, int second, bool rotated) {
    const auto p = load<N>(head + first);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen(p.v[i]), y[i] = Wide<T>(0);
    if (!rotated) return;
    const auto q = load<N>(head + second);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = widen(q.v[i]);
  }

  // As read, of a weight in T or fp32.
  __device__ __forceinline__ void read_weight(const QkHeads& a, bool is_q, int first, int second, bool rotated) {
    const void* w = is_q ? a.q_weight : a.k_weight;
    if (a.w_dtype == DType::f32) {
      read(static_cast<const float*>(w), first, second, rotated);
    } else {
      read(static_cast<const T*>(w), first, second, rotated);
    }
  }

  __device__ __forceinline__ void write(T* head, int first, int second, bool rotated) const {
    Pack<T, N> p, q;
#pragma unroll
    for (int i = 0; i < N; ++i) p.v[i] = narrow<T>(x[i]), q.v[i] = narrow<T>(y[i]);
    store(head + first, p);
    if (rotated) store(head + second, q);
  }

  // Pair i: channels i of both vectors, or, of neighbours, channels 2i and 2i + 1 of the two concatenated.
  template <bool INTERLEAVED>
  __device__ __forceinline__ void rotate(const Pack<Wide<T>, N>& cos, const Pack<Wide<T>, N>& sin, Wide<T> turn) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Wide<T>& p = INTERLEAVED ? (2 * i < N ? x[(2 * i) % N] : y[(2 * i) % N]) : x[i];
      Wide<T>& q = INTERLEAVED ? (2 * i + 1 < N ? x[(2 * i + 1) % N] : y[(2 * i + 1) % N]) : y[i];
      const Wide<T> c = cos.v[i], s = sin.v[i] * turn, before = p;
      p = before * c - q * s;
      q = q * c + before * s;
    }
  }
};

// The sum over the LANES threads of a head, in each of them.
template <int LANES, class S>
__device__ __forceinline__ S head_sum(S x) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

// Heads of a call are counted in 32 bits, for 64-bit division is slow: 2^31 of them would not fit any GPU. Offsets are not.
struct Token {
  unsigned number, row, in_row;

  __device__ __forceinline__ Token(const QkHeads& a, unsigned token)
      : number(token), row(token / static_cast<unsigned>(a.seq)), in_row(token - row * static_cast<unsigned>(a.seq)) {}

  __device__ __forceinline__ int64_t offset(int64_t row_stride, int64_t token_stride) const {
    return row * row_stride + in_row * token_stride;
  }
};

// Tables of a token; NaN where its position is outside them.
template <class T, int N>
__device__ __forceinline__ void angles_of(const QkHeads& a, const Token& token, int angle, Pack<Wide<T>, N>& cos,
                                          Pack<Wide<T>, N>& sin) {
  const int64_t position = a.positions == nullptr ? a.offset + token.in_row : a.positions[token.number];
  const bool known = position >= 0 && position < a.table_rows;
  const int64_t at = (known ? position : 0) * a.half + angle;
  cos = load<N>(static_cast<const Wide<T>*>(a.cos) + at);
  sin = load<N>(static_cast<const Wide<T>*>(a.sin) + at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!known) cos.v[i] = Wide<T>(NAN);
  }
}

// Head `number` of a token's normed heads: its offset in qkv, and its number among those of its kind.
struct Head {
  bool is_q;
  int in_qkv, of_kind;

  __device__ __forceinline__ Head(const QkHeads& a, int number) {
    const int q = static_cast<int>(a.q_heads), k = static_cast<int>(a.k_heads), group = number / (q + k);
    const int inside = number - group * (q + k);
    is_q = inside < q;
    in_qkv = group * (q + k + static_cast<int>(a.v_heads)) + inside;
    of_kind = is_q ? group * q + inside : group * k + inside - q;
  }
};

template <class T, int N, int LANES, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads) forward(QkNormRopeFwd a) {
  using S = Wide<T>;
  const unsigned normed = static_cast<unsigned>(a.groups * (a.q_heads + a.k_heads));
  const unsigned items = static_cast<unsigned>(a.batch * a.seq) * normed;
  const unsigned item = blockIdx.x * (kThreads / LANES) + threadIdx.x / LANES;
  const int lane = threadIdx.x % LANES;
  // Threads without a head go through the sums as well, which want all lanes of a warp, with the last head's values.
  const bool mine = item < items;
  const unsigned at = mine ? item : items - 1;
  const Token token(a, at / normed);
  const Head head(a, static_cast<int>(at - token.number * normed));
  const int width = static_cast<int>(a.head_dim);
  const T* in = static_cast<const T*>(a.qkv) + token.offset(a.qkv_batch, a.qkv_seq) +
                static_cast<int64_t>(head.in_qkv) * width;
  T* out = static_cast<T*>(head.is_q ? a.q : a.k) +
           (token.number * a.groups * (head.is_q ? a.q_heads : a.k_heads) + head.of_kind) * width;
  const int units = static_cast<int>(a.half) / N + (width - 2 * static_cast<int>(a.half)) / N;
  Values<T, N> value;
  S squares = S(0);
#pragma unroll 1  // once where vectors are read: a unit stays in registers
  for (int number = lane; number < units; number += LANES) {
    const Unit<N, INTERLEAVED> unit(a, number);
    value.read(in, unit.first, unit.second, unit.rotated);
#pragma unroll
    for (int i = 0; i < N; ++i) squares += value.x[i] * value.x[i] + value.y[i] * value.y[i];
  }
  squares = head_sum<LANES>(squares);
  const S rstd = S(1) / sqrt(squares / S(width) + S(a.eps));
  if (!mine) return;
  if (lane == 0) static_cast<S*>(a.rstd)[at] = rstd;
#pragma unroll 1
  for (int number = lane; number < units; number += LANES) {
    const Unit<N, INTERLEAVED> unit(a, number);
    if (N == 1) value.read(in, unit.first, unit.second, unit.rotated);
    Values<T, N> factor;
    factor.read_weight(a, head.is_q, unit.first, unit.second, unit.rotated);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value.x[i] *= rstd * (factor.x[i] + S(a.w_offset));
      value.y[i] *= rstd * (factor.y[i] + S(a.w_offset));
    }
    if (unit.rotated) {
      Pack<S, N> cos, sin;
      angles_of<T, N>(a, token, unit.angle, cos, sin);
      value.template rotate<INTERLEAVED>(cos, sin, S(1));
    }
    value.write(out, unit.first, unit.second, unit.rotated);
  }
}

// ---- Backward: a block has one partition of the tokens and one kind of heads: q (blockIdx.y = 0), k (1), or v, which is
// copied (2). LANES threads go from head to head and keep their part of the weight gradient in registers.

template <class T, int N>
__device__ __forceinline__ void copy_v(const QkNormRopeBwd& a, int64_t first_token, int64_t last_token) {
  const unsigned vectors = static_cast<unsigned>(a.head_dim) / N, v_heads = static_cast<unsigned>(a.v_heads);
  const unsigned of_token = static_cast<unsigned>(a.groups) * v_heads * vectors;
  const int64_t normed = a.q_heads + a.k_heads, all = normed + a.v_heads;
  const unsigned items = static_cast<unsigned>(last_token - first_token) * of_token;
  for (unsigned item = threadIdx.x; item < items; item += kThreads) {
    const Token token(a, static_cast<unsigned>(first_token) + item / of_token);
    const unsigned rest = item % of_token, head = rest / vectors, channel = (rest - head * vectors) * N;
    const unsigned group = head / v_heads;
    const int64_t place = (token.number * a.groups + group) * all + normed + (head - group * v_heads);
    store(static_cast<T*>(a.dqkv) + place * a.head_dim + channel,
          load<N>(static_cast<const T*>(a.dv) + token.offset(a.dv_batch, a.dv_seq) + head * a.dv_head + channel));
  }
}

template <class T, int N, int LANES, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads) backward(QkNormRopeBwd a) {
  using S = Wide<T>;
  constexpr int kTeams = kThreads / LANES;  // threads of one head
  __shared__ S sums[N == 1 ? 1 : kTeams][N == 1 ? 1 : LANES * 2 * N];
  const int64_t tokens = a.batch * a.seq, first_token = tokens * blockIdx.x / a.partitions;
  const int64_t last_token = tokens * (blockIdx.x + 1) / a.partitions;
  if (blockIdx.y == 2) return copy_v<T, N>(a, first_token, last_token);
  const bool is_q = blockIdx.y == 0;
  const int lane = threadIdx.x % LANES, team = threadIdx.x / LANES, width = static_cast<int>(a.head_dim);
  const int half = static_cast<int>(a.half), units = half / N + (width - 2 * half) / N;
  const unsigned kind_heads = static_cast<unsigned>(is_q ? a.q_heads : a.k_heads);
  const unsigned heads = static_cast<unsigned>(a.groups) * kind_heads;
  const int64_t normed = a.q_heads + a.k_heads, all = normed + a.v_heads;
  const T* dy_base = static_cast<const T*>(is_q ? a.dq : a.dk);
  const int64_t dy_batch = is_q ? a.dq_batch : a.dk_batch, dy_seq = is_q ? a.dq_seq : a.dk_seq;
  const int64_t dy_head = is_q ? a.dq_head : a.dk_head;
  S* partial = a.partial == nullptr ? nullptr : static_cast<S*>(a.partial) + (blockIdx.y * a.partitions + blockIdx.x) * width;
  const Unit<N, INTERLEAVED> own(a, lane);  // of vectors, a thread has this one alone
  Values<T, N> factor, dw;
#pragma unroll
  for (int i = 0; i < N; ++i) dw.x[i] = dw.y[i] = factor.x[i] = factor.y[i] = S(0);
  if (N > 1 && own.exists) factor.read_weight(a, is_q, own.first, own.second, own.rotated);
  // Without vectors, one warp works and adds to `partial` in memory: the order of the sums must not depend on chance.
  if (N == 1) {
    if (team != 0) return;
    for (int i = lane; partial != nullptr && i < width; i += LANES) partial[i] = S(0);
    __syncwarp();
  }
  const unsigned items = static_cast<unsigned>(last_token - first_token) * heads;
  constexpr unsigned teams = N == 1 ? 1 : kTeams;
  for (unsigned start = 0; start < items; start += teams) {
    const bool mine = start + team < items;  // all lanes of a warp take part in its sums
    const unsigned item = mine ? start + team : items - 1, from_first = item / heads, head = item - from_first * heads;
    const unsigned group = head / kind_heads;
    const Token token(a, static_cast<unsigned>(first_token) + from_first);
    const int64_t inside = head - group * kind_heads + (is_q ? 0 : a.q_heads), of_token = token.number * a.groups + group;
    const T* x_head = static_cast<const T*>(a.qkv) + token.offset(a.qkv_batch, a.qkv_seq) + (group * all + inside) * width;
    const T* dy_of = dy_base + token.offset(dy_batch, dy_seq) + head * dy_head;
    T* dx_head = static_cast<T*>(a.dqkv) + (of_token * all + inside) * width;
    const S rstd = static_cast<const S*>(a.rstd)[of_token * normed + inside];
    Values<T, N> x, grad;
    // Reads a unit and rotates its gradient back.
    const auto fetch = [&](const Unit<N, INTERLEAVED>& unit) {
      x.read(x_head, unit.first, unit.second, unit.rotated);
      grad.read(dy_of, unit.first, unit.second, unit.rotated);
      if (!unit.rotated) return;
      Pack<S, N> cos, sin;
      angles_of<T, N>(a, token, unit.angle, cos, sin);
      grad.template rotate<INTERLEAVED>(cos, sin, S(-1));
    };
    S dot = S(0);
#pragma unroll 1
    for (int number = lane; number < units; number += LANES) {
      const Unit<N, INTERLEAVED> unit(a, number);
      fetch(unit);
      if (N == 1) factor.read_weight(a, is_q, unit.first, unit.second, unit.rotated);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const S p = grad.x[i] * (x.x[i] * rstd), q = grad.y[i] * (x.y[i] * rstd);
        dot += p * (factor.x[i] + S(a.w_offset)) + q * (factor.y[i] + S(a.w_offset));
        if (N > 1 && mine) dw.x[i] += p, dw.y[i] += q;
        if (N == 1 && partial != nullptr) {
          partial[unit.first] += p;
          if (unit.rotated) partial[unit.second] += q;
        }
      }
    }
    const S mean = head_sum<LANES>(dot) / S(width);
    if (!mine) continue;
#pragma unroll 1
    for (int number = lane; number < units; number += LANES) {
      const Unit<N, INTERLEAVED> unit(a, number);
      if (N == 1) {
        fetch(unit);
        factor.read_weight(a, is_q, unit.first, unit.second, unit.rotated);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        grad.x[i] = (grad.x[i] * (factor.x[i] + S(a.w_offset)) - x.x[i] * rstd * mean) * rstd;
        grad.y[i] = (grad.y[i] * (factor.y[i] + S(a.w_offset)) - x.y[i] * rstd * mean) * rstd;
      }
      grad.write(dx_head, unit.first, unit.second, unit.rotated);
    }
  }
  if constexpr (N > 1) {
    if (partial == nullptr) return;
    // Channels in the order of a head, one row a team; then every thread adds up its channels in the order of the teams.
    if (own.exists) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[team][own.first + i] = dw.x[i];
        if (own.rotated) sums[team][own.second + i] = dw.y[i];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int channel = threadIdx.x; channel < width; channel += kThreads) {
      S total = S(0);
      for (int other = 0; other < kTeams; ++other) total += sums[other][channel];
      partial[channel] = total;
    }
  }
}

// Calls run(vector length, lanes of a head) as the head and the alignment allow: one unit a thread, or single elements.
template <class T, class Run>
int choose(const QkHeads& a, bool packed, Run run) {
  constexpr int n = kPerVector<T>;
  for (const int64_t size : {a.half, a.head_dim, a.qkv_batch, a.qkv_seq}) packed = packed && size % n == 0;
  for (const void* p : {a.qkv, a.cos, a.sin, a.q_weight, a.k_weight}) packed = packed && aligned(p);
  const int64_t units = a.half / n + (a.head_dim - 2 * a.half) / n;
  // float64 is for checks of gradients, not for speed.
  if constexpr (sizeof(T) < 8) {
    if (packed && units <= 4) return run(Number<n>{}, Number<4>{});
    if (packed && units <= 8) return run(Number<n>{}, Number<8>{});
    if (packed && units <= 16) return run(Number<n>{}, Number<16>{});
    if (packed && units <= 32) return run(Number<n>{}, Number<32>{});
  }
  return run(Number<1>{}, Number<32>{});
}

template <class T>
int run_forward(const QkNormRopeFwd& a, cudaStream_t stream) {
  const int64_t items = a.batch * a.seq * a.groups * (a.q_heads + a.k_heads);
  if (items == 0 || a.head_dim == 0) return 0;
  if (items > kMostHeads) return static_cast<int>(cudaErrorInvalidValue);
  return choose<T>(a, aligned(a.q) && aligned(a.k), [&](auto n, auto lanes) {
    constexpr int vector = decltype(n)::n, threads = decltype(lanes)::n, heads = kThreads / threads;
    const auto blocks = static_cast<unsigned>((items + heads - 1) / heads);
    if (a.interleaved) {
      forward<T, vector, threads, true><<<blocks, kThreads, 0, stream>>>(a);
    } else {
      forward<T, vector, threads, false><<<blocks, kThreads, 0, stream>>>(a);
    }
    return last_error();
  });
}

template <class T>
int run_backward(const QkNormRopeBwd& a, cudaStream_t stream) {
  if (a.partitions == 0 || a.head_dim == 0) return 0;
  if (a.batch * a.seq * a.groups * (a.q_heads + a.k_heads + a.v_heads) > kMostHeads) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  bool packed = aligned(a.dq) && aligned(a.dk) && aligned(a.dv) && aligned(a.dqkv);
  for (const int64_t stride : {a.dq_batch, a.dq_seq, a.dq_head, a.dk_batch, a.dk_seq, a.dk_head, a.dv_batch, a.dv_seq,
                               a.dv_head}) {
    packed = packed && stride % kPerVector<T> == 0;
  }
  return choose<T>(a, packed, [&](auto n, auto lanes) {
    constexpr int vector = decltype(n)::n, threads = decltype(lanes)::n;
    const dim3 blocks(static_cast<unsigned>(a.partitions), 3);
    if (a.interleaved) {
      backward<T, vector, threads, true><<<blocks, kThreads, 0, stream>>>(a);
    } else {
      backward<T, vector, threads, false><<<blocks, kThreads, 0, stream>>>(a);
    }
    return last_error();
  });
}

}  // namespace

int qk_norm_rope_fwd(const QkNormRopeFwd& a, void* stream) {
  return with_type(a.dtype, [&](auto t) { return run_forward<decltype(t)>(a, static_cast<cudaStream_t>(stream)); });
}

int qk_norm_rope_bwd(const QkNormRopeBwd& a, void* stream) {
  return with_type(a.dtype, [&](auto t) { return run_backward<decltype(t)>(a, static_cast<cudaStream_t>(stream)); });
}

}  // namespace cuda
}  // namespace megatronish
