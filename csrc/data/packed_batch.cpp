// Windows of a token stream, straight from the mapped file into the arrays of a batch: one pass where numpy needs ten calls
// (SampleRows.batch of megatronish/data/samples/rows.py does the same in numpy). Called by token_stream.py there through ctypes; uses
// neither torch nor Python.
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kIgnoredLabel = -100;
constexpr int64_t kUnknownDtype = -1, kOutside = -2;

// Widening is three times as fast with the vectors of AVX2, which every x86 of the last ten years has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_AVX2_TOO __attribute__((target_clones("avx2", "default")))
#else
#define WITH_AVX2_TOO
#endif

// Documents laid end to end. Field for field `_NativeStream` in token_stream.py.
struct Stream {
  const void* tokens;            // of the full data set, as stored
  const int64_t* stream_starts;  // [documents + 1], where each document begins in the stream, then the stream's length
  const int64_t* source_starts;  // [documents], where each begins in `tokens`
  int64_t documents;
  int64_t token_kind;  // MMIDIDX's number of the dtype
};

// The arrays of a batch.
struct Arrays {
  int64_t* tokens;     // [rows, length]
  int64_t* labels;     // [rows, length]
  int32_t* positions;  // [rows, length]; null: no document mask
  int32_t* bounds;     // [room + 1]: where documents begin in the flattened tokens, then rows * length; last the longest one
  int64_t room;
};

template <class Token>
WITH_AVX2_TOO void widen(const Token* from, int64_t count, int64_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int64_t>(from[i]);
}

WITH_AVX2_TOO void count_up(int64_t count, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(i);
}

template <class Token>
int64_t fill(const Stream& stream, const int64_t* begins, int64_t rows, int64_t length, const Arrays& out) {
  const Token* stored = static_cast<const Token*>(stream.tokens);
  const int64_t total = stream.stream_starts[stream.documents];
  int64_t bounds = 0, longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = begins[row], end = begin + length + 1;
    if (begin < 0 || end > total) return kOutside;
    int64_t* tokens = out.tokens + row * length;
    int64_t* labels = out.labels + row * length;
    const int64_t* ends = std::upper_bound(stream.stream_starts, stream.stream_starts + stream.documents + 1, begin);
    for (int64_t at = begin; at < end; ++ends) {
      if (*ends == at) continue;  // an empty document
      const int64_t document = ends - stream.stream_starts - 1, stop = std::min(*ends, end);
      const Token* from = stored + stream.source_starts[document] + (at - stream.stream_starts[document]);
      const int64_t offset = at - begin, count = stop - at;
      const int64_t inputs = std::min(count, length - offset);  // the window's last token is a label only
      widen(from, inputs, tokens + offset);
      const int64_t first = offset == 0 ? 1 : 0;  // and its first one an input only
      widen(from + first, count - first, labels + offset + first - 1);
      if (out.positions != nullptr) {
        if (offset > 0) labels[offset - 1] = kIgnoredLabel;
        count_up(inputs, out.positions + row * length + offset);
        if (inputs > 0) {
          if (bounds < out.room) out.bounds[bounds] = static_cast<int32_t>(row * length + offset);
          ++bounds;
          longest = std::max(longest, inputs);
        }
      }
      at = stop;
    }
  }
  if (out.positions == nullptr) return 0;
  if (bounds < out.room) out.bounds[bounds] = static_cast<int32_t>(rows * length);
  out.bounds[out.room] = static_cast<int32_t>(longest);
  return bounds + 1;
}

}  // namespace

// Fills the arrays with the windows of length + 1 tokens from each of begins[rows]. Returns how many bounds there are (more
// than room: too many, call again with that room), kUnknownDtype, or kOutside for a window that is not within the stream.
extern "C" __attribute__((visibility("default"))) int64_t megatronish_packed_batch(
    const Stream* stream, const int64_t* begins, int64_t rows, int64_t length, int64_t* tokens, int64_t* labels,
    int32_t* positions, int32_t* bounds, int64_t room) {
  const Arrays out{tokens, labels, positions, bounds, room};
  switch (stream->token_kind) {
    case 1: return fill<uint8_t>(*stream, begins, rows, length, out);
    case 2: return fill<int8_t>(*stream, begins, rows, length, out);
    case 3: return fill<int16_t>(*stream, begins, rows, length, out);
    case 4: return fill<int32_t>(*stream, begins, rows, length, out);
    case 5: return fill<int64_t>(*stream, begins, rows, length, out);
    case 8: return fill<uint16_t>(*stream, begins, rows, length, out);
    default: return kUnknownDtype;
  }
}
