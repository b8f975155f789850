// Rotary position embedding, out of place or in place: one thread N pairs of one head, or N channels that are copied.
#include "common.cuh"

namespace megatronish {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int N, bool INTERLEAVED, class Index>
__global__ void __launch_bounds__(kThreads) rotate(Rope a, Index items) {
  using S = Wide<T>;
  Index item = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const int rotated = static_cast<int>(a.half) / N;
  const int copied = a.in == a.out ? 0 : static_cast<int>(a.head_dim - 2 * a.half) / N;
  // Heads change faster than tokens, so that a block reads few rows of the tables.
  const int part = static_cast<int>(item % (rotated + copied));
  item /= rotated + copied;
  const int head = static_cast<int>(item % static_cast<Index>(a.heads));
  item /= static_cast<Index>(a.heads);
  const int group = static_cast<int>(item % static_cast<Index>(a.groups));
  const int64_t token = item / static_cast<Index>(a.groups);
  const int64_t b = token / a.seq, s = token - b * a.seq;
  const T* in = static_cast<const T*>(a.in) + b * a.in_batch + s * a.in_seq + group * a.in_group + head * a.in_head;
  T* out = static_cast<T*>(a.out) + b * a.out_batch + s * a.out_seq + group * a.out_group + head * a.out_head;
  if (part >= rotated) {
    const int64_t channel = 2 * a.half + static_cast<int64_t>(part - rotated) * N;
    store(out + channel, load<N>(in + channel));
    return;
  }
  const int64_t position = a.positions == nullptr ? a.offset + s : a.positions[token];
  const bool known = position >= 0 && position < a.table_rows;
  const int64_t angle = (known ? position : 0) * a.half + part * N;
  const auto cos = load<N>(static_cast<const S*>(a.cos) + angle), sin = load<N>(static_cast<const S*>(a.sin) + angle);
  const int64_t first = INTERLEAVED ? 2 * part * N : part * N, second = INTERLEAVED ? first + N : first + a.half;
  auto p = load<N>(in + first), q = load<N>(in + second);
  const S turn = a.inverse ? S(-1) : S(1), outside = S(0) / S(0);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // Pair i of neighbours is in elements 2i and 2i + 1 of the two concatenated packs.
    T& x = INTERLEAVED ? (2 * i < N ? p.v[(2 * i) % N] : q.v[(2 * i) % N]) : p.v[i];
    T& y = INTERLEAVED ? (2 * i + 1 < N ? p.v[(2 * i + 1) % N] : q.v[(2 * i + 1) % N]) : q.v[i];
    const S c = known ? cos.v[i] : outside, t = sin.v[i] * turn, wide_x = widen(x), wide_y = widen(y);
    x = narrow<T>(wide_x * c - wide_y * t);
    y = narrow<T>(wide_y * c + wide_x * t);
  }
  store(out + first, p);
  store(out + second, q);
}

template <class T, int N, bool INTERLEAVED>
int launch(const Rope& a, cudaStream_t stream) {
  const int64_t copied = a.in == a.out ? 0 : (a.head_dim - 2 * a.half) / N;
  const int64_t items = a.batch * a.seq * a.groups * a.heads * (a.half / N + copied);
  if (items == 0) return 0;
  return on_grid((items + kThreads - 1) / kThreads, [&](unsigned blocks) {
    if (items <= 0x7FFFFFFF - kThreads) {
      rotate<T, N, INTERLEAVED, uint32_t><<<blocks, kThreads, 0, stream>>>(a, static_cast<uint32_t>(items));
    } else {
      rotate<T, N, INTERLEAVED, int64_t><<<blocks, kThreads, 0, stream>>>(a, items);
    }
  });
}

}  // namespace

int rope(const Rope& a, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int n = kPerVector<T>;
    bool packed = aligned(a.in) && aligned(a.out) && aligned(a.cos) && aligned(a.sin);
    for (const int64_t size : {a.half, a.head_dim, a.in_batch, a.in_seq, a.in_group, a.in_head, a.out_batch, a.out_seq,
                               a.out_group, a.out_head}) {
      packed = packed && size % n == 0;
    }
    if (packed) return a.interleaved ? launch<T, n, true>(a, stream) : launch<T, n, false>(a, stream);
    return a.interleaved ? launch<T, 1, true>(a, stream) : launch<T, 1, false>(a, stream);
  });
}

}  // namespace cuda
}  // namespace megatronish
