// The last row of tensors of more than 2^31 elements, by the kernels of one level: the same bits as the only row of small
// ones. Kernels take a range of rows, so that no page but those of that row is ever touched. Exit status 0: the same;
// 1: not; 77: this machine does not reserve so much address space.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <initializer_list>

#include "cpu/levels.h"

using namespace megatronish;
using namespace megatronish::MEGATRONISH_LEVEL;

namespace megatronish {
bool beyond_caches(int64_t) { return FAR_STREAMED; }
}  // namespace megatronish

namespace {

constexpr int64_t kWidth = 4096, kRows = (int64_t{1} << 31) / kWidth + 2, kLast = kRows - 1;
constexpr int64_t kBytes = kRows * 2 * kWidth * static_cast<int64_t>(sizeof(float));  // of a far [rows, 2 * width]
int wrong = 0;

// [rows, width] of floats with numbers in its last row only.
struct Rows {
  float* near;  // [width]
  float* far;   // [kRows, width]
  int64_t width;

  Rows(int64_t width_in, int seed) : width(width_in) {
    near = map(width * static_cast<int64_t>(sizeof(float)));
    far = map(kBytes);
    for (int64_t i = 0; seed != 0 && i < width; ++i) last()[i] = near[i] = static_cast<float>((i * 37 + seed * 101) % 97 - 48) / 16;
  }
  static float* map(int64_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) _Exit(77);
    return static_cast<float*>(p);
  }
  float* last() const { return far + kLast * width; }
  void same(const char* what) const {
    bool zero = true;
    for (int64_t i = 0; i < width; ++i) zero = zero && near[i] == 0;
    if (!zero && memcmp(near, last(), width * sizeof(float)) == 0) return;
    printf("%s: the far row differs\n", what);
    wrong = 1;
  }
};

void norms() {
  const Rows x(kWidth, 1), residual(kWidth, 2), w(kWidth, 3), y(kWidth, 0), sum(kWidth, 0), rstd(1, 0);
  const Rows dy(kWidth, 4), dx(kWidth, 0), partial(kWidth, 0);
  for (const bool far : {false, true}) {
    const int64_t row = far ? kLast : 0, rows = row + 1;
    RmsNormFwd f{};
    f.x = far ? x.far : x.near;
    f.residual = far ? residual.far : residual.near;
    f.w = w.near;
    f.y = far ? y.far : y.near;
    f.res_out = far ? sum.far : sum.near;
    f.rstd = far ? rstd.far : rstd.near;
    f.rows = rows;
    f.width = kWidth;
    rms_norm_fwd(f, row, rows);
    RmsNormBwd b{};
    b.dy = far ? dy.far : dy.near;
    b.dres = f.residual;
    b.x = f.res_out;
    b.w = w.near;
    b.rstd = f.rstd;
    b.dx = far ? dx.far : dx.near;
    b.partial = far ? partial.far : partial.near;
    b.rows = b.partitions = rows;  // a row each
    b.width = kWidth;
    rms_norm_bwd(b, row, rows);
  }
  y.same("rms_norm_fwd: y");
  sum.same("rms_norm_fwd: res_out");
  rstd.same("rms_norm_fwd: rstd");
  dx.same("rms_norm_bwd: dx");
  partial.same("rms_norm_bwd: partial sums");
}

// The last columns of the sum of partitions whose second one begins after element 2^31.
void weight_gradient() {
  constexpr int64_t kColumns = 64, width = (int64_t{1} << 31) + kColumns;
  const Rows first(kColumns, 5), second(kColumns, 6), dw(kColumns, 0);
  float* partial = Rows::map(2 * width * static_cast<int64_t>(sizeof(float)));
  float near_partial[2 * kColumns];
  for (int64_t i = 0; i < kColumns; ++i) {
    partial[width - kColumns + i] = near_partial[i] = first.near[i];
    partial[2 * width - kColumns + i] = near_partial[kColumns + i] = second.near[i];
  }
  RmsNormBwd b{};
  b.partitions = 2;
  b.width = width;
  b.partial = partial;
  b.dw = dw.far;
  rms_norm_bwd_dw(b, width - kColumns, width);
  b.width = kColumns;
  b.partial = near_partial;
  b.dw = dw.near;
  rms_norm_bwd_dw(b, 0, kColumns);
  memcpy(dw.last(), dw.far + width - kColumns, kColumns * sizeof(float));
  dw.same("rms_norm_bwd_dw");
}

void swiglu() {
  const Rows gate_up(2 * kWidth, 7), y(kWidth, 0), dy(kWidth, 8), dgate_up(2 * kWidth, 0), again(kWidth, 0);
  for (const bool far : {false, true}) {
    const int64_t row = far ? kLast : 0;
    SwigluFwd f{};
    f.gate_up = far ? gate_up.far : gate_up.near;
    f.y = far ? y.far : y.near;
    f.rows = row + 1;
    f.width = kWidth;
    swiglu_fwd(f, row, row + 1);
    SwigluBwd b{};
    b.gate_up = f.gate_up;
    b.dy = far ? dy.far : dy.near;
    b.dgate_up = far ? dgate_up.far : dgate_up.near;
    b.y = far ? again.far : again.near;
    b.rows = row + 1;
    b.width = kWidth;
    swiglu_bwd(b, row, row + 1);
  }
  y.same("swiglu_fwd");
  dgate_up.same("swiglu_bwd: dgate_up");
  again.same("swiglu_bwd: y");
}

void ropes() {
  const Rows x(kWidth, 9), cos(32, 10), sin(32, 11);
  for (const bool interleaved : {false, true}) {
    const Rows y(kWidth, 0);
    for (const bool far : {false, true}) {
      const int64_t token = far ? kLast : 0;
      Rope r{};
      r.in = far ? x.far : x.near;
      r.out = far ? y.far : y.near;
      r.cos = far ? cos.far : cos.near;
      r.sin = far ? sin.far : sin.near;
      r.batch = r.groups = 1;
      r.seq = r.table_rows = token + 1;
      r.heads = kWidth / 64;
      r.head_dim = 64;
      r.half = 32;
      r.in_batch = r.out_batch = r.seq * kWidth;
      r.in_seq = r.out_seq = kWidth;
      r.in_head = r.out_head = 64;
      r.interleaved = interleaved;
      r.inverse = true;
      rope(r, token, token + 1);
    }
    y.same(interleaved ? "rope, pairs" : "rope, halves");
  }
}

}  // namespace

int main() {
  norms();
  weight_gradient();
  swiglu();
  ropes();
  return wrong;
}
