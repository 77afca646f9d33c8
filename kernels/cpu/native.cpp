// Encoder layers on an x86 CPU: rows quantized, int8 products, attention, GELU, residual and LayerNorm.
//
// One call runs a whole stack of layers, norms behind (BERT) or before (ViT, ModernBERT), over sequences that lie behind each other, without padding between
// them. It computes what `qbert.inference.cpu_layers.FusedLayers` does, which is its slow twin. Plain C functions, so
// that it is built in seconds, without torch's headers; `qbert.kernels.cpu.native` builds, loads and calls it.
//
// An activation x is quantized per token to u = round((x - low) / step) in 0..255 (asymmetric: low and step from the row;
// symmetric and static: low = -offset * step). With weights scale (q - zero) the product is
//     y = step (scale acc - correction count) + low sum + bias,      acc = start + sum_i u q
// with start = -offset sum_i q (0 if asymmetric), correction = scale zero, count = sum_i (u - offset), and low sum for
// asymmetric ranges only: sum = scale sum_i (q - zero).

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__AVX512VNNI__)
constexpr int W = 16, NR = 4, MR = 6;  // floats in a vector; vectors and rows of a tile: 24 sums stay in registers
#else
constexpr int W = 8, NR = 2, MR = 4;
#endif
constexpr int NB = NR * W;  // columns of a tile
typedef float Float __attribute__((vector_size(W * 4)));
typedef int32_t Int __attribute__((vector_size(W * 4)));
typedef uint8_t Byte __attribute__((vector_size(W)));
typedef int16_t Short __attribute__((vector_size(W * 2)));

extern "C" {

enum Range { SYMMETRIC, ASYMMETRIC, STATIC };
enum Activation { GELU, GELU_TANH, RELU };

// One linear map [rows, columns]. Arrays over rows are padded with zeros to a multiple of NB; weight is laid out
// [rows / NB][depth / group][NB][group], group = 4, or 2 where `wide`; depth is columns padded to a multiple of 4. Further
// terms of the same map follow as `next`, of rising `place`.
struct Matrix {
  int32_t rows, columns, depth, wide, range, offset;
  int32_t place, adds;  // the first column of the output that is its own; whether it is added to the term before
  float step, unused;
  const int8_t* weight;
  const int32_t* start;
  const float *scale, *bias, *sum, *correction;  // the last is null where there are no zeros
  const Matrix *down, *next;  // what the input goes through first, whole in itself; another term of the same input; or null
};

// What is added to the scores of a query q and a key k by their distance, whose row is p = places[farthest + distance], distances
// beyond `farthest` counting as that: (q k + q keys[p]) scale + k queries[p]. Rows rise with the distance.
struct Positions {
  const float* keys;      // [heads][depth][columns], columns a multiple of NB from `rows`; or null
  const float* queries;   // [heads][rows][depth], times scale; or null
  const int32_t* places;  // [2 farthest + 1]
  int64_t farthest, rows, columns;
  float scale, unused;
  int64_t place(int64_t distance) const { return places[std::min(std::max(distance, -farthest), farthest) + farthest]; }
  // How many rows lie between those of the smallest and the largest distance.
  int64_t between(int64_t queries, int64_t keys) const { return place(queries - 1) - place(1 - keys) + 1; }
};

struct Layer {
  Matrix qkv, output, ffn_in, ffn_out;
  const float *norm1, *shift1, *norm2, *shift2;  // padded with zeros; of pre-norm layers null where there is none
  float eps1, eps2;
  int32_t heads, activation;
  int32_t pre_norm, gated;  // gated: the second half of what ffn_in gives multiplies the activated first half
  int32_t window, unused;   // tokens that are seen on each side; 0 for all
  const float* rotation;    // [positions][head width], cosines and then sines of half a head each; or null
  const Positions* positions;
};

// With epsilon below 0 a scale and a shift, MobileBERT's NoNorm; weight null where there is none.
struct Norm {
  const float *weight, *shift;
  float eps, unused;
};

struct FeedForward {
  Matrix in, out;
  Norm norm;
};

// MobileBERT's, thin between wide ones. `wide` is what reads the wide input: the way down, then what attention reads (`shares`:
// its own way down, and value) or query, key and value; or nothing more (`inside`). `inner` is what reads a way down: query and
// key, or all three; nothing if neither. The residual of the attention is what the first way down gives.
struct ThinLayer {
  Matrix wide, inner, output, up;
  Norm down, shared, attention, last;
  const FeedForward* nets;
  int32_t count, heads, activation, shares, inside, unused;
};

// Sequences: the tokens starts[i] to starts[i + 1], of which the first keys[i] are seen by all. A bias, if any, is added
// to the scores: float at bias + sequence * strides[0] + head * strides[1] + query * strides[2] + key.
struct Batch {
  int64_t sequences;
  const int64_t *starts, *keys;
  const float* bias;
  int64_t strides[3];
};

}  // extern "C"

namespace {

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class V>
inline V load(const void* p) {  // aligned or not
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
inline Float all(float v) { return v - Float{}; }
// Of a NaN and a number, both give the second argument.
#if defined(__AVX512VNNI__)
inline Float smaller(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
inline Float larger(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline Float smaller(Float a, Float b) { return (Float)_mm256_min_ps((__m256)a, (__m256)b); }
inline Float larger(Float a, Float b) { return (Float)_mm256_max_ps((__m256)a, (__m256)b); }
#endif
inline Int iota() {
  Int v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}
// A row's vector at `at`, with `other` in the lanes behind its end.
inline Float load_tail(const float* row, int64_t at, int64_t end, Float other) {
  Float v = load<Float>(row + at);
  return iota() < static_cast<int32_t>(end - at) ? v : other;
}

#if defined(__AVX512VNNI__)
inline float sum_of(Float v) { return _mm512_reduce_add_ps((__m512)v); }
inline float max_of(Float v) { return _mm512_reduce_max_ps((__m512)v); }
inline float min_of(Float v) { return _mm512_reduce_min_ps((__m512)v); }
#else
// All lanes of a vector as one: the upper half joins the lower until one is left.
template <class Join>
inline float joined(Float v, Join join) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = join(lanes[i], lanes[i + half]);
  return lanes[0];
}
inline float sum_of(Float v) { return joined(v, [](float a, float b) { return a + b; }); }
inline float max_of(Float v) { return joined(v, [](float a, float b) { return a > b ? a : b; }); }
inline float min_of(Float v) { return joined(v, [](float a, float b) { return a < b ? a : b; }); }
#endif

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to the nearest integer, ties to even

// e^x with an error of about one unit in the last place; 0 below -87.
inline Float exp_of(Float x) {
  Float t = smaller(larger(x, all(-87.0f)), all(88.0f));
  Float n = (t * 1.44269504f + ROUND) - ROUND;
  Float r = t - n * 0.693359375f + n * 2.12194440e-4f;
  Float p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int power = (__builtin_convertvector(n, Int) + 127) << 23;
  p *= (Float)power;
  p = x < all(-87.0f) ? all(0.0f) : p;
  return x == x ? p : x;
}

// Rational approximation of erf, as in Eigen: 4e-7 at most from the true value.
inline Float erf_of(Float x) {
  Float t = smaller(larger(x, all(-4.0f)), all(4.0f));
  Float s = t * t;
  Float a = all(-2.72614225801306e-10f);
  a = a * s + 2.77068142495902e-08f;
  a = a * s + -2.10102402082508e-06f;
  a = a * s + -5.69250639462346e-05f;
  a = a * s + -7.34990630326855e-04f;
  a = a * s + -2.95459980854025e-03f;
  a = a * s + -1.60960333262415e-02f;
  Float b = all(-1.45660718464996e-05f);
  b = b * s + -2.13374055278905e-04f;
  b = b * s + -1.68282697438203e-03f;
  b = b * s + -7.37332916720468e-03f;
  b = b * s + -1.42647390514189e-02f;
  return t * a / b;
}

inline Float activated(Float x, int kind) {
  if (kind == GELU) return x * (erf_of(x * 0.70710678f) * 0.5f + 0.5f);
  if (kind == RELU) return x < all(0.0f) ? all(0.0f) : x;
  Float u = x * (x * x * 0.044715f + 1.0f) * 0.79788456f;
  return x / (exp_of(u * -2.0f) + 1.0f);
}

// Threads that work on the same tokens; of `n` pieces of work each takes a share.
struct Team {
  int place, size;
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
  int64_t first(int64_t n) const { return n * place / size; }
  int64_t last(int64_t n) const { return n * (place + 1) / size; }
};

struct RowGrid {
  float step, low, count;
};

// ---------------------------------------------------------------------------------------------- rows to codes

inline void write_codes(uint8_t* to, Int codes) { store(to, __builtin_convertvector(codes, Byte)); }
inline void write_codes(int16_t* to, Int codes) { store(to, __builtin_convertvector(codes, Short)); }

// Row x[columns] to codes; both may be read and written up to the next multiple of W.
template <class Code>
void quantize_row(const float* x, const Matrix& m, Code* codes, RowGrid& grid) {
  const int64_t n = m.columns, whole = n / W * W;
  float inverse, add;
  if (m.range == STATIC) {
    // No code stands for NaN, which must not come out as a number.
    Float broken = all(0.0f);
    for (int64_t i = 0; i < n; i += W) {
      Float v = load_tail(x, i, n, all(0.0f));
      broken = v == v ? broken : v;
    }
    grid.step = m.step + sum_of(broken) * 0.0f;
    grid.low = 0;
    inverse = 1.0f / m.step;
    add = static_cast<float>(m.offset);
  } else {
    Float first = all(x[0]), least = first, most = first, broken = all(0.0f);
    for (int64_t i = 0; i < whole; i += W) {
      Float v = load<Float>(x + i);
      least = smaller(v, least);
      most = larger(v, most);
      broken += v * 0.0f;
    }
    if (whole < n) {
      Float v = load_tail(x, whole, n, first);
      least = smaller(v, least);
      most = larger(v, most);
      broken += v * 0.0f;
    }
    const float low = min_of(least), high = max_of(most), nothing = sum_of(broken);
    const float span = m.range == ASYMMETRIC ? high - low : std::max(high, -low);
    const float levels = m.range == ASYMMETRIC ? 255.0f : 127.0f;
    inverse = span > 0 ? levels / span : 0.0f;
    if (!(inverse <= 3.0e38f)) inverse = 0.0f;
    grid.step = span / levels + nothing;
    grid.low = m.range == ASYMMETRIC ? low + nothing : 0.0f;
    add = m.range == ASYMMETRIC ? -low * inverse : static_cast<float>(m.offset);
    if (m.range == ASYMMETRIC) {  // (x - low) first: its product with the inverse is then never off by the size of low
      Int total = {};
      for (int64_t i = 0; i < n; i += W) {
        Float v = larger(smaller((load<Float>(x + i) - low) * inverse, all(255.0f)), all(0.0f));
        Int code = __builtin_convertvector((v + ROUND) - ROUND, Int);
        if (i + W > n) code = iota() < static_cast<int32_t>(n - i) ? code : Int{};
        write_codes(codes + i, code);
        total += code;
      }
      int64_t count = 0;
      for (int i = 0; i < W; i++) count += total[i];
      grid.count = grid.step * static_cast<float>(count);
      return;
    }
  }
  Int total = {};
  const Int offset = Int{} + m.offset;
  for (int64_t i = 0; i < n; i += W) {
    Float v = (load<Float>(x + i) * inverse + ROUND) - ROUND;
    v = larger(smaller(v + add, all(255.0f)), all(0.0f));
    Int code = __builtin_convertvector(v, Int);
    Int centred = code - offset;
    if (i + W > n) {
      Int inside = iota() < static_cast<int32_t>(n - i);
      code = inside ? code : Int{};
      centred = inside ? centred : Int{};
    }
    write_codes(codes + i, code);
    total += centred;
  }
  int64_t count = 0;
  for (int i = 0; i < W; i++) count += total[i];
  grid.count = grid.step * static_cast<float>(count);
}

// Codes of rows of one width, as bytes, or as 16-bit numbers for `wide` matrices.
struct Codes {
  uint8_t* at;
  RowGrid* grids;
  int64_t stride;  // bytes a row
};

// Where gated, x [2 n] becomes activated first half times second half, [n]; what is behind is lost.
inline void activate_row(float* x, int64_t n, int kind, bool gated) {
  for (int64_t i = 0; i < n; i += W) {
    Float y = activated(load<Float>(x + i), kind);
    if (gated) y *= load<Float>(x + n + i);
    store(x + i, y);
  }
}

inline void quantize(const float* x, int64_t stride, int64_t rows, const Matrix& m, Codes codes, Team team) {
  for (int64_t r = team.first(rows); r < team.last(rows); r++) {
    uint8_t* to = codes.at + r * codes.stride;
    if (m.wide)
      quantize_row(x + r * stride, m, reinterpret_cast<int16_t*>(to), codes.grids[r]);
    else
      quantize_row(x + r * stride, m, to, codes.grids[r]);
  }
}

// ---------------------------------------------------------------------------------------------- products

inline Int dot(Int sum, Int bytes, Int weights) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)weights);
#elif defined(__AVXVNNI__)
  return (Int)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)weights);
#else
  // Exact while |w0 + w1| <= 128 for neighbours; other weights are `wide`.
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)weights);
  return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

template <int ROWS, bool WIDE>
inline void tile(const uint8_t* a, int64_t stride, const Matrix& m, int64_t block, Int (&sums)[ROWS][NR]) {
  const int8_t* w = m.weight + block * NB * m.depth;
  for (int n = 0; n < NR; n++) {
    Int s = load<Int>(m.start + block * NB + n * W);
    for (int r = 0; r < ROWS; r++) sums[r][n] = s;
  }
  constexpr int group = WIDE ? 2 : 4;
  const int64_t steps = m.depth / group;
  for (int64_t k = 0; k < steps; k++) {
    Int b[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; n++) {
#if !defined(__AVX512VNNI__)
      if (WIDE) {
        b[n] = (Int)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + n * W * 2)));
        continue;
      }
#endif
      b[n] = load<Int>(w + n * W * 4);
    }
    w += NB * group;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t four;
      std::memcpy(&four, a + r * stride + k * 4, 4);
      const Int x = Int{} + four;
#pragma GCC unroll 4
      for (int n = 0; n < NR; n++) {
#if !defined(__AVX512VNNI__)
        if (WIDE) {
          sums[r][n] += (Int)_mm256_madd_epi16((__m256i)x, (__m256i)b[n]);
          continue;
        }
#endif
        sums[r][n] = dot(sums[r][n], x, b[n]);
      }
    }
  }
}

// Where the rows of a product go; they may be added to what is there.
struct Output {
  float* at;
  int64_t stride;
  bool add;
};

template <int ROWS, bool WIDE>
void tile_rows(const Codes& codes, int64_t row, const Matrix& m, int64_t block, const Output& out) {
  Int sums[ROWS][NR];
  tile<ROWS, WIDE>(codes.at + row * codes.stride, codes.stride, m, block, sums);
#pragma GCC unroll 4
  for (int n = 0; n < NR; n++) {
    const int64_t column = block * NB + n * W;
    const Float scale = load<Float>(m.scale + column), bias = load<Float>(m.bias + column);
    const Float total = m.range == ASYMMETRIC ? load<Float>(m.sum + column) : all(0.0f);
    const Float zero = m.correction ? load<Float>(m.correction + column) : all(0.0f);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const RowGrid& grid = codes.grids[row + r];
      Float y = __builtin_convertvector(sums[r][n], Float) * scale;
      y = y * grid.step + bias;
      if (m.range == ASYMMETRIC) y += total * grid.low;
      if (m.correction) y -= zero * grid.count;
      float* to = out.at + (row + r) * out.stride + column;
      if (out.add) y += load<Float>(to);
      store(to, y);
    }
  }
}

template <bool WIDE>
void product(const Codes& codes, int64_t rows, const Matrix& m, const Output& out, Team team) {
  const int64_t blocks = padded(m.rows, NB) / NB;
  const int64_t groups = (rows + MR - 1) / MR;
  for (int64_t block = team.first(blocks); block < team.last(blocks); block++) {
    for (int64_t g = 0; g < groups; g++) {
      const int64_t row = rows * g / groups;
      switch (rows * (g + 1) / groups - row) {
        case 1: tile_rows<1, WIDE>(codes, row, m, block, out); break;
        case 2: tile_rows<2, WIDE>(codes, row, m, block, out); break;
        case 3: tile_rows<3, WIDE>(codes, row, m, block, out); break;
        case 4: tile_rows<4, WIDE>(codes, row, m, block, out); break;
        case 5: tile_rows<std::min(5, MR), WIDE>(codes, row, m, block, out); break;
        default: tile_rows<MR, WIDE>(codes, row, m, block, out);
      }
    }
  }
}

inline void multiply(const Codes& codes, int64_t rows, const Matrix& m, const Output& out, Team team) {
#if !defined(__AVX512VNNI__)
  if (m.wide) return product<true>(codes, rows, m, out, team);
#endif
  product<false>(codes, rows, m, out, team);
}

// What passes between the two factors of a map: so many rows, `stride` floats apart.
struct Between {
  float* at;
  int64_t stride;
};

inline bool same_grid(const Matrix& a, const Matrix& b) {
  return a.range == b.range && a.offset == b.offset && a.step == b.step && a.wide == b.wide && a.columns == b.columns;
}

// A map with all of its terms. A term's rows are padded to a multiple of NB, which the next term writes over: one after the other.
void map_rows(const float* x, int64_t stride, int64_t rows, const Matrix& map, Codes codes, Between between, const Output& out,
              Team team) {
  const Matrix* held = nullptr;  // the term for which x lies in `codes`
  for (const Matrix* term = &map; term; term = term->next) {
    const Matrix& first = term->down ? *term->down : *term;
    if (!held || !same_grid(*held, first)) {
      quantize(x, stride, rows, first, codes, team);
      team.wait();
    }
    held = &first;
    if (term->down) {
      multiply(codes, rows, first, {between.at, between.stride, false}, team);
      team.wait();
      quantize(between.at, between.stride, rows, *term, codes, team);
      team.wait();
      held = nullptr;
    }
    multiply(codes, rows, *term, {out.at + term->place, out.stride, out.add || term->adds}, team);
    team.wait();
  }
}

// Columns of what a map reads.
inline int64_t width_of(const Matrix& map) { return map.down ? map.down->columns : map.columns; }

// Bytes of a row of codes, and floats between two factors, that suffice for a map.
inline int64_t code_bytes(const Matrix& map) {
  int64_t most = 0;
  for (const Matrix* term = &map; term; term = term->next)
    for (const Matrix* m = term; m; m = m->down) most = std::max<int64_t>(most, m->columns * (m->wide ? 2 : 1));
  return most;
}
inline int64_t floats_between(const Matrix& map) {
  int64_t most = 0;
  for (const Matrix* term = &map; term; term = term->next)
    if (term->down) most = std::max(most, padded(term->down->rows, NB));
  return most;
}

// ---------------------------------------------------------------------------------------------- the rest of a layer

// LayerNorm, or with eps below 0 NoNorm, of a row of `width` values in place; what is behind it, up to the next multiple of W, is zero and stays so.
inline void normalize(float* x, int64_t width, const float* weight, const float* shift, float eps) {
  if (eps < 0) {
    for (int64_t i = 0; i < width; i += W) store(x + i, load<Float>(x + i) * load<Float>(weight + i) + load<Float>(shift + i));
    return;
  }
  Float total = all(0.0f);
  for (int64_t i = 0; i < width; i += W) total += load<Float>(x + i);
  const float mean = sum_of(total) / static_cast<float>(width);
  Float squares = all(0.0f);
  for (int64_t i = 0; i < width; i += W) {
    Float d = load<Float>(x + i) - mean;
    if (i + W > width) d = iota() < static_cast<int32_t>(width - i) ? d : all(0.0f);
    squares += d * d;
  }
  const float factor = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i += W)
    store(x + i, (load<Float>(x + i) - mean) * factor * load<Float>(weight + i) + load<Float>(shift + i));
}

// scores[r][VECTORS * W] of ROWS queries q[r][depth] with keys transposed, [depth][columns].
template <int ROWS, int VECTORS>
inline void score_tile(const float* q, const float* keys, int64_t depth, int64_t columns, float* scores) {
  Float sums[ROWS][VECTORS] = {};
  for (int64_t i = 0; i < depth; i++) {
    Float b[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; n++) b[n] = load<Float>(keys + i * columns + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const Float x = all(q[r * depth + i]);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++) sums[r][n] += x * b[n];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) store(scores + r * columns + n * W, sums[r][n]);
}

// Of the columns begin to end, multiples of W.
template <int ROWS>
inline void score_rows(const float* q, const float* keys, int64_t depth, int64_t columns, int64_t begin, int64_t end,
                       float* scores) {
  for (int64_t c = begin; c < end; c += NB) {
    switch (std::min<int64_t>((end - c) / W, NR)) {
      case 1: score_tile<ROWS, 1>(q, keys + c, depth, columns, scores + c); break;
      case 2: score_tile<ROWS, 2>(q, keys + c, depth, columns, scores + c); break;
      case 3: score_tile<ROWS, std::min(3, NR)>(q, keys + c, depth, columns, scores + c); break;
      default: score_tile<ROWS, NR>(q, keys + c, depth, columns, scores + c);
    }
  }
}

// out[r][VECTORS * W] = p[r][keys] values[keys][stride].
template <int ROWS, int VECTORS>
inline void mix_rows(const float* p, int64_t columns, int64_t keys, const float* values, int64_t stride, float* out) {
  Float sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < keys; k++) {
    Float b[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; n++) b[n] = load<Float>(values + k * stride + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const Float x = all(p[r * columns + k]);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++) sums[r][n] += x * b[n];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) store(out + r * stride + n * W, sums[r][n]);
}

// One head of one sequence. qkv points at its first query; keys and values lie `width` and 2 `width` behind.
struct Head {
  const float* qkv;
  int64_t stride, width, depth, rows, keys;
  const float* bias;  // of the first query, or null
  int64_t bias_stride;
  float* out;
  int64_t out_stride;
  const float* rotation;  // of the first token, or null
  int64_t window;
  const Positions* positions;
  int64_t number;  // of the head
};

// A row of a head, rotated and times `scale`, to every `step`-th place.
inline void copy_head(const float* from, int64_t depth, const float* rotation, float scale, float* to, int64_t step) {
  if (!rotation) {
    for (int64_t i = 0; i < depth; i++) to[i * step] = from[i] * scale;
    return;
  }
  const int64_t half = depth / 2;
  const float *cosine = rotation, *sine = rotation + half;
  for (int64_t i = 0; i < half; i++) {
    const float a = from[i] * scale, b = from[half + i] * scale;
    to[i * step] = a * cosine[i] - b * sine[i];
    to[(half + i) * step] = b * cosine[i] + a * sine[i];
  }
}

// Of a head with so many rows and keys.
struct HeadScratch {
  float *keys, *values, *queries, *scores, *mixed;
  float *by_key, *by_query;  // what positions add: [MR][rows of the table], [rows of the table between those of distances][keys]
  int32_t* places;           // of all distances, from the largest on
  static int64_t floats(int64_t depth, int64_t rows, int64_t longest, const Positions* positions) {
    const int64_t columns = padded(longest, W), deep = padded(depth, W);
    const int64_t own = depth * columns + longest * deep + MR * depth + MR * columns + MR * deep + 5 * W;
    if (!positions) return own;
    return own + MR * positions->columns + positions->between(rows, longest) * columns + rows + longest + 3 * W;
  }
  HeadScratch(float* at, int64_t depth, int64_t rows, int64_t longest, const Positions* positions) {
    const int64_t columns = padded(longest, W), deep = padded(depth, W);
    keys = at;
    values = keys + padded(depth * columns, W);
    queries = values + longest * deep;
    scores = queries + padded(MR * depth, W);
    mixed = scores + MR * columns;
    by_key = mixed + MR * deep;
    by_query = by_key + (positions ? MR * positions->columns : 0);
    places = reinterpret_cast<int32_t*>(by_query + (positions ? positions->between(rows, longest) * columns : 0));
  }
};

// k queries[p] of all keys, for the rows p of the table that distances have; of each row the keys that some query meets there.
void position_scores(const Head& h, const HeadScratch& s) {
  const int64_t count = h.rows + h.keys - 1, columns = padded(h.keys, W);
  for (int64_t i = 0; i < count; i++) s.places[i] = static_cast<int32_t>(h.positions->place(h.rows - 1 - i));
  if (!h.positions->queries) return;
  const float* queries = h.positions->queries + h.number * h.positions->rows * h.depth;
  const int64_t first = s.places[count - 1], last = s.places[0] + 1;
  int64_t least = count - 1;  // the smallest distance whose row is not before those of this round
  for (int64_t row = first; row < last; row += MR) {
    const int64_t end = std::min<int64_t>(row + MR, last);
    while (least > 0 && s.places[least] < row) least--;
    int64_t most = least;
    while (most > 0 && s.places[most - 1] < end) most--;
    const int64_t smallest = h.rows - 1 - least, largest = h.rows - 1 - most;
    const int64_t begin = std::max<int64_t>(-largest, 0) / W * W;
    const int64_t stop = padded(std::min(h.keys, h.rows - smallest), W);
    const float* q = queries + row * h.depth;
    float* to = s.by_query + (row - first) * columns;
    switch (end - row) {
      case 1: score_rows<1>(q, s.keys, h.depth, columns, begin, stop, to); break;
      case 2: score_rows<2>(q, s.keys, h.depth, columns, begin, stop, to); break;
      case 3: score_rows<3>(q, s.keys, h.depth, columns, begin, stop, to); break;
      case 4: score_rows<4>(q, s.keys, h.depth, columns, begin, stop, to); break;
      case 5: score_rows<std::min(5, MR)>(q, s.keys, h.depth, columns, begin, stop, to); break;
      default: score_rows<MR>(q, s.keys, h.depth, columns, begin, stop, to);
    }
  }
}

// Adds what positions give to the scores of queries row to row + ROWS.
template <int ROWS>
inline void add_positions(const Head& h, const HeadScratch& s, int64_t row, int64_t columns) {
  const Positions& positions = *h.positions;
  const int64_t wide = positions.columns;
  const int32_t first = s.places[h.rows + h.keys - 2];
  if (positions.keys) {
    const int64_t begin = positions.place(row - h.keys + 1) / W * W, end = padded(positions.place(row + ROWS - 1) + 1, W);
    score_rows<ROWS>(s.queries, positions.keys + h.number * h.depth * wide, h.depth, wide, begin, end, s.by_key);
  }
  for (int r = 0; r < ROWS; r++) {
    const int32_t* places = s.places + h.rows - 1 - row - r;
    float* p = s.scores + r * columns;
    const float *by_key = s.by_key + r * wide, *by_query = s.by_query;
    const int32_t keys = static_cast<int32_t>(h.keys), stride = static_cast<int32_t>(columns);
    if (positions.keys) {
#pragma GCC ivdep
      for (int32_t k = 0; k < keys; k++) p[k] += by_key[places[k]];
    }
    if (positions.queries) {
#pragma GCC ivdep
      for (int32_t k = 0; k < keys; k++) p[k] += by_query[(places[k] - first) * stride + k];
    }
  }
}

template <int ROWS>
void attend_rows(const Head& h, const HeadScratch& s, int64_t row, float scale) {
  const int64_t columns = padded(h.keys, W), deep = padded(h.depth, W);
  // The keys that some of these rows see: begin to end, and for the vectors up to a multiple of W.
  int64_t begin = 0, end = h.keys;
  if (h.window) {
    end = std::min(end, row + ROWS + h.window);
    begin = std::min(std::max<int64_t>(row - h.window, 0), end) / W * W;
  }
  const int64_t last = padded(end, W);
  for (int r = 0; r < ROWS; r++)
    copy_head(h.qkv + (row + r) * h.stride, h.depth, h.rotation ? h.rotation + (row + r) * h.depth : nullptr, scale,
              s.queries + r * h.depth, 1);
  score_rows<ROWS>(s.queries, s.keys, h.depth, columns, begin, last, s.scores);
  if (h.positions) add_positions<ROWS>(h, s, row, columns);
  for (int r = 0; r < ROWS; r++) {
    float* p = s.scores + r * columns;
    if (h.bias)
      for (int64_t k = begin; k < end; k++) p[k] += h.bias[(row + r) * h.bias_stride + k];
    if (h.window) {
      for (int64_t k = begin; k < std::min(end, row + r - h.window); k++) p[k] = -INFINITY;
      for (int64_t k = std::max(begin, row + r + h.window + 1); k < end; k++) p[k] = -INFINITY;
    }
    for (int64_t k = end; k < last; k++) p[k] = -INFINITY;
    Float most = all(-INFINITY);
    for (int64_t k = begin; k < end; k += W) most = larger(load<Float>(p + k), most);
    const float top = max_of(most);
    Float total = all(0.0f);
    // A query that sees no key at all gets zeros, as from torch's attention.
    const float from = top == -INFINITY ? 0.0f : top;
    for (int64_t k = begin; k < end; k += W) {
      Float e = exp_of(load<Float>(p + k) - from);
      store(p + k, e);
      total += e;
    }
    const float sum = sum_of(total), inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int64_t k = begin; k < end; k += W) store(p + k, load<Float>(p + k) * inverse);
  }
  const float *seen = s.scores + begin, *values = s.values + begin * deep;
  for (int64_t c = 0; c < deep; c += 4 * W) {
    switch (std::min<int64_t>((deep - c) / W, 4)) {
      case 1: mix_rows<ROWS, 1>(seen, columns, end - begin, values + c, deep, s.mixed + c); break;
      case 2: mix_rows<ROWS, 2>(seen, columns, end - begin, values + c, deep, s.mixed + c); break;
      case 3: mix_rows<ROWS, 3>(seen, columns, end - begin, values + c, deep, s.mixed + c); break;
      default: mix_rows<ROWS, 4>(seen, columns, end - begin, values + c, deep, s.mixed + c);
    }
  }
  for (int r = 0; r < ROWS; r++)
    std::memcpy(h.out + (row + r) * h.out_stride, s.mixed + r * deep, h.depth * sizeof(float));
}

void attend(const Head& h, const HeadScratch& s) {
  const int64_t columns = padded(h.keys, W), deep = padded(h.depth, W);
  for (int64_t k = 0; k < h.keys; k++) {
    const float* key = h.qkv + h.width + k * h.stride;
    copy_head(key, h.depth, h.rotation ? h.rotation + k * h.depth : nullptr, 1.0f, s.keys + k, columns);
    std::memcpy(s.values + k * deep, key + h.width, h.depth * sizeof(float));
    for (int64_t i = h.depth; i < deep; i++) s.values[k * deep + i] = 0;
  }
  for (int64_t i = 0; i < h.depth; i++)
    for (int64_t k = h.keys; k < columns; k++) s.keys[i * columns + k] = 0;
  if (h.positions) position_scores(h, s);
  const float scale = h.positions ? h.positions->scale : 1.0f / std::sqrt(static_cast<float>(h.depth));
  const int64_t groups = (h.rows + MR - 1) / MR;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t row = h.rows * g / groups;
    switch (h.rows * (g + 1) / groups - row) {
      case 1: attend_rows<1>(h, s, row, scale); break;
      case 2: attend_rows<2>(h, s, row, scale); break;
      case 3: attend_rows<3>(h, s, row, scale); break;
      case 4: attend_rows<4>(h, s, row, scale); break;
      case 5: attend_rows<std::min(5, MR)>(h, s, row, scale); break;
      default: attend_rows<MR>(h, s, row, scale);
    }
  }
}

// Memory that is aligned and grows; one for each thread that works alone, one for each team.
struct Arena {
  char* memory = nullptr;
  size_t size = 0;
  ~Arena() { std::free(memory); }
  void reserve(size_t bytes) {
    if (bytes <= size) return;
    std::free(memory);
    size = padded(bytes + bytes / 4, 64);
    memory = static_cast<char*>(std::aligned_alloc(64, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
    std::memset(memory, 0, size);
  }
};

constexpr int64_t ROWS_AT_ONCE = 48;  // so that the widest activations of a layer stay in the second cache

// Where the activations of some tokens lie while they pass through the layers, of which the widest decides.
struct Room {
  float *x, *qkv, *mixed, *normed, *hidden, *scratch;
  Codes narrow, broad;
  Between between;
  int64_t wide_x, wide_qkv, wide_mixed, wide_hidden, scratch_floats, at_once;

  static size_t lay_out(Room* room, char* memory, const Layer* layers, int64_t count, int64_t tokens, int64_t longest,
                        int members) {
    size_t used = 0;
    auto take = [&](size_t bytes) {
      char* at = memory + used;
      used += padded(bytes, 64) + 64;
      return at;
    };
    Room own;
    Room& r = room ? *room : own;
    int64_t inner = 0, hidden = 0, narrow = 0, broad = 0;
    r.scratch_floats = 0, r.between.stride = 0;
    for (const Layer* layer = layers; layer < layers + count; layer++) {
      const Matrix *qkv = &layer->qkv, *output = &layer->output, *in = &layer->ffn_in, *out = &layer->ffn_out;
      inner = std::max(inner, width_of(*output)), hidden = std::max<int64_t>(hidden, in->rows);
      for (const Matrix* m : {qkv, output, in}) narrow = std::max(narrow, code_bytes(*m));
      broad = std::max(broad, code_bytes(*out));
      for (const Matrix* m : {qkv, output, in, out}) r.between.stride = std::max(r.between.stride, floats_between(*m));
      const int64_t floats = HeadScratch::floats(width_of(*output) / layer->heads, longest, longest, layer->positions);
      r.scratch_floats = std::max(r.scratch_floats, padded(floats, W));
    }
    r.wide_x = padded(layers->output.rows, NB), r.wide_mixed = padded(inner, NB);
    r.wide_qkv = padded(3 * inner, NB) + NB;  // the last of three terms may end in the middle of a tile
    r.wide_hidden = padded(hidden, NB);
    r.at_once = std::min<int64_t>(tokens, ROWS_AT_ONCE * members);
    r.x = reinterpret_cast<float*>(take(tokens * r.wide_x * 4));
    r.qkv = reinterpret_cast<float*>(take(tokens * r.wide_qkv * 4));
    r.mixed = reinterpret_cast<float*>(take(tokens * r.wide_mixed * 4));
    r.normed = reinterpret_cast<float*>(take(layers->pre_norm ? r.at_once * r.wide_x * 4 : 0));
    r.hidden = reinterpret_cast<float*>(take(r.at_once * r.wide_hidden * 4));
    r.between.at = reinterpret_cast<float*>(take(r.at_once * r.between.stride * 4));
    r.scratch = reinterpret_cast<float*>(take(members * r.scratch_floats * 4));
    r.narrow.stride = padded(narrow, 64), r.broad.stride = padded(broad, 64);
    r.narrow.at = reinterpret_cast<uint8_t*>(take(r.at_once * r.narrow.stride));
    r.broad.at = reinterpret_cast<uint8_t*>(take(r.at_once * r.broad.stride));
    r.narrow.grids = reinterpret_cast<RowGrid*>(take(r.at_once * sizeof(RowGrid)));
    r.broad.grids = reinterpret_cast<RowGrid*>(take(r.at_once * sizeof(RowGrid)));
    return used;
  }
};

// Rows of x as the next product reads them: x itself, or its norm in `room.normed` where that stands before.
inline const float* normed(const float* x, int64_t rows, const Layer& layer, const float* weight, const float* shift, float eps,
                           const Room& room, Team team) {
  if (!layer.pre_norm || !weight) return x;
  for (int64_t r = team.first(rows); r < team.last(rows); r++) {
    float* to = room.normed + r * room.wide_x;
    std::memcpy(to, x + r * room.wide_x, room.wide_x * sizeof(float));
    normalize(to, layer.output.rows, weight, shift, eps);
  }
  return room.normed;
}

// Every head of sequences begin to end: from `room.qkv` into `room.mixed`, whose rows are `wide` apart.
template <class AnyRoom>
void attend_all(const Batch& batch, int64_t begin, int64_t end, int64_t heads, int64_t width, const AnyRoom& room, int64_t wide,
                const float* rotation, int64_t window, const Positions* positions, Team team) {
  const int64_t base = batch.starts[begin], depth = width / heads, items = (end - begin) * heads;
  for (int64_t item = team.first(items); item < team.last(items); item++) {
    const int64_t sequence = begin + item / heads, head = item % heads;
    const int64_t start = batch.starts[sequence] - base, rows = batch.starts[sequence + 1] - base - start;
    const float* bias = batch.bias;
    if (bias) bias += sequence * batch.strides[0] + head * batch.strides[1];
    const Head h = {room.qkv + start * room.wide_qkv + head * depth, room.wide_qkv, width, depth, rows,
                    batch.keys[sequence], bias, batch.strides[2],
                    room.mixed + start * wide + head * depth, wide, rotation, window, positions, head};
    attend(h, HeadScratch(room.scratch + team.place * room.scratch_floats, depth, rows, batch.keys[sequence], positions));
  }
}

void run_layer(const Layer& layer, const Batch& batch, int64_t begin, int64_t end, const Room& room, Team team) {
  const int64_t base = batch.starts[begin], tokens = batch.starts[end] - base;
  const int64_t width = layer.output.rows, inner = width_of(layer.output);
  for (int64_t row = 0; row < tokens; row += room.at_once) {
    const int64_t rows = std::min(room.at_once, tokens - row);
    const float* x = normed(room.x + row * room.wide_x, rows, layer, layer.norm1, layer.shift1, layer.eps1, room, team);
    const Output out = {room.qkv + row * room.wide_qkv, room.wide_qkv, false};
    map_rows(x, room.wide_x, rows, layer.qkv, room.narrow, room.between, out, team);
  }
  attend_all(batch, begin, end, layer.heads, inner, room, room.wide_mixed, layer.rotation, layer.window, layer.positions, team);
  team.wait();
  for (int64_t row = 0; row < tokens; row += room.at_once) {
    const int64_t rows = std::min(room.at_once, tokens - row);
    float* x = room.x + row * room.wide_x;
    const Output added = {x, room.wide_x, true};
    const float* mixed = room.mixed + row * room.wide_mixed;
    map_rows(mixed, room.wide_mixed, rows, layer.output, room.narrow, room.between, added, team);
    for (int64_t r = team.first(rows); !layer.pre_norm && r < team.last(rows); r++)
      normalize(x + r * room.wide_x, width, layer.norm1, layer.shift1, layer.eps1);
    const float* y = normed(x, rows, layer, layer.norm2, layer.shift2, layer.eps2, room, team);
    const Output hidden = {room.hidden, room.wide_hidden, false};
    map_rows(y, room.wide_x, rows, layer.ffn_in, room.narrow, room.between, hidden, team);
    for (int64_t r = team.first(rows); r < team.last(rows); r++)
      activate_row(room.hidden + r * room.wide_hidden, width_of(layer.ffn_out), layer.activation, layer.gated);
    map_rows(room.hidden, room.wide_hidden, rows, layer.ffn_out, room.broad, room.between, added, team);
    for (int64_t r = team.first(rows); !layer.pre_norm && r < team.last(rows); r++)
      normalize(x + r * room.wide_x, width, layer.norm2, layer.shift2, layer.eps2);
    team.wait();
  }
}

// ---------------------------------------------------------------------------------------------- thin layers

struct ThinRoom {
  float *x, *thin, *qkv, *mixed, *read, *shared, *hidden, *scratch;
  Codes codes;
  int64_t wide_x, wide_thin, wide_qkv, wide_read, wide_hidden, scratch_floats, at_once;

  static size_t lay_out(ThinRoom* room, char* memory, const ThinLayer* layers, int64_t, int64_t tokens, int64_t longest, int members) {
    const ThinLayer& layer = layers[0];  // all are of the same widths
    size_t used = 0;
    auto take = [&](size_t bytes) {
      char* at = memory + used;
      used += padded(bytes, 64) + 64;
      return at;
    };
    auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
    ThinRoom own;
    ThinRoom& r = room ? *room : own;
    const int64_t width = layer.output.columns;
    int64_t most = std::max(layer.wide.columns, layer.output.columns), broad = 0;
    for (int32_t i = 0; i < layer.count; i++) broad = std::max<int64_t>(broad, layer.nets[i].in.rows);
    r.wide_x = padded(layer.up.rows, NB), r.wide_thin = padded(width, NB), r.wide_qkv = padded(3 * width, NB);
    r.wide_read = padded(layer.wide.rows, NB), r.wide_hidden = padded(broad, NB);
    r.at_once = std::min<int64_t>(tokens, ROWS_AT_ONCE * members);
    r.x = floats(tokens * r.wide_x), r.thin = floats(tokens * r.wide_thin), r.qkv = floats(tokens * r.wide_qkv);
    r.mixed = floats(tokens * r.wide_thin), r.read = floats(r.at_once * r.wide_read);
    r.shared = floats(r.at_once * r.wide_thin), r.hidden = floats(r.at_once * r.wide_hidden);
    r.scratch_floats = padded(HeadScratch::floats(width / layer.heads, longest, longest, nullptr), W);
    r.scratch = floats(members * r.scratch_floats);
    r.codes.stride = padded(std::max(most, broad) * 2, 64);
    r.codes.at = reinterpret_cast<uint8_t*>(take(r.at_once * r.codes.stride));
    r.codes.grids = reinterpret_cast<RowGrid*>(take(r.at_once * sizeof(RowGrid)));
    return used;
  }
};

// A piece of a row, zero up to the next multiple of W, and its norm.
inline void copy_normed(const float* from, int64_t width, const Norm& norm, float* to) {
  std::memcpy(to, from, width * sizeof(float));
  for (int64_t i = width; i < padded(width, W); i++) to[i] = 0;
  if (norm.weight) normalize(to, width, norm.weight, norm.shift, norm.eps);
}

void run_thin_layer(const ThinLayer& layer, const Batch& batch, int64_t begin, int64_t end, const ThinRoom& room, Team team) {
  const int64_t base = batch.starts[begin], tokens = batch.starts[end] - base;
  const int64_t width = layer.output.columns;
  auto linear = [&](const float* from, int64_t stride, int64_t rows, const Matrix& m, const Output& out) {
    map_rows(from, stride, rows, m, room.codes, {nullptr, 0}, out, team);
  };
  for (int64_t row = 0; row < tokens; row += room.at_once) {
    const int64_t rows = std::min(room.at_once, tokens - row);
    float *thin = room.thin + row * room.wide_thin, *qkv = room.qkv + row * room.wide_qkv;
    linear(room.x + row * room.wide_x, room.wide_x, rows, layer.wide, {room.read, room.wide_read, false});
    for (int64_t r = team.first(rows); r < team.last(rows); r++) {
      const float* read = room.read + r * room.wide_read;
      copy_normed(read, width, layer.down, thin + r * room.wide_thin);
      if (layer.shares) copy_normed(read + width, width, layer.shared, room.shared + r * room.wide_thin);
    }
    if (layer.shares) linear(room.shared, room.wide_thin, rows, layer.inner, {qkv, room.wide_qkv, false});
    if (layer.inside) linear(thin, room.wide_thin, rows, layer.inner, {qkv, room.wide_qkv, false});
    // What attention reads straight from the wide input: value, or all three.
    const int64_t place = layer.shares ? 2 * width : 0, count = layer.inside ? 0 : 3 * width - place;
    for (int64_t r = team.first(rows); count && r < team.last(rows); r++)
      std::memcpy(qkv + r * room.wide_qkv + place, room.read + r * room.wide_read + layer.wide.rows - count,
                  count * sizeof(float));
    team.wait();
  }
  attend_all(batch, begin, end, layer.heads, width, room, room.wide_thin, nullptr, 0, nullptr, team);
  team.wait();
  for (int64_t row = 0; row < tokens; row += room.at_once) {
    const int64_t rows = std::min(room.at_once, tokens - row);
    float *thin = room.thin + row * room.wide_thin, *x = room.x + row * room.wide_x;
    auto norm = [&](float* of, int64_t stride, int64_t wide, const Norm& n) {
      for (int64_t r = team.first(rows); n.weight && r < team.last(rows); r++)
        normalize(of + r * stride, wide, n.weight, n.shift, n.eps);
    };
    linear(room.mixed + row * room.wide_thin, room.wide_thin, rows, layer.output, {thin, room.wide_thin, true});
    norm(thin, room.wide_thin, width, layer.attention);
    for (int32_t i = 0; i < layer.count; i++) {
      const FeedForward& net = layer.nets[i];
      linear(thin, room.wide_thin, rows, net.in, {room.hidden, room.wide_hidden, false});
      for (int64_t r = team.first(rows); r < team.last(rows); r++)
        activate_row(room.hidden + r * room.wide_hidden, net.in.rows, layer.activation, false);
      linear(room.hidden, room.wide_hidden, rows, net.out, {thin, room.wide_thin, true});
      norm(thin, room.wide_thin, width, net.norm);
    }
    linear(thin, room.wide_thin, rows, layer.up, {x, room.wide_x, true});
    norm(x, room.wide_x, layer.up.rows, layer.last);
    team.wait();
  }
}

inline const Matrix& last_of(const Layer& layer) { return layer.output; }
inline const Matrix& last_of(const ThinLayer& layer) { return layer.up; }
inline void run_one(const Layer& l, const Batch& b, int64_t begin, int64_t end, const Room& r, Team t) { run_layer(l, b, begin, end, r, t); }
inline void run_one(const ThinLayer& l, const Batch& b, int64_t begin, int64_t end, const ThinRoom& r, Team t) {
  run_thin_layer(l, b, begin, end, r, t);
}

// Sequences begin to end through all layers: x in, y out, both [tokens, width].
template <class Kind, class Place>
void run_some(const Kind* layers, int64_t count, const Batch& batch, int64_t begin, int64_t end, const float* x, float* y,
              const Place& room, Team team) {
  const int64_t base = batch.starts[begin], tokens = batch.starts[end] - base, width = last_of(layers[0]).rows;
  for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
    std::memcpy(room.x + t * room.wide_x, x + (base + t) * width, width * sizeof(float));
    std::memset(room.x + t * room.wide_x + width, 0, (room.wide_x - width) * sizeof(float));
  }
  team.wait();
  for (int64_t i = 0; i < count; i++) run_one(layers[i], batch, begin, end, room, team);
  for (int64_t t = team.first(tokens); t < team.last(tokens); t++)
    std::memcpy(y + (base + t) * width, room.x + t * room.wide_x, width * sizeof(float));
}

thread_local Arena arena;

// some(memory, block, team) for every block, in this many bytes of memory: by one thread, by one thread each if `alone`, or
// by all threads together. 0, or 1 if there is no memory.
template <class Some>
int32_t in_blocks(int64_t blocks, int32_t threads, bool alone, size_t bytes, const Some& some) {
  int32_t failed = 0;
  try {
    if (threads <= 1) {
      arena.reserve(bytes);
      for (int64_t block = 0; block < blocks; block++) some(arena.memory, block, {0, 1});
    } else if (alone) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
      for (int64_t block = 0; block < blocks; block++) {
        try {
          arena.reserve(bytes);
          some(arena.memory, block, {0, 1});
        } catch (const std::bad_alloc&) {
          failed = 1;
        }
      }
    } else {
      arena.reserve(bytes);
      char* memory = arena.memory;
#pragma omp parallel num_threads(threads)
      for (int64_t block = 0; block < blocks; block++) {
        some(memory, block, {omp_get_thread_num(), omp_get_num_threads()});
#pragma omp barrier
      }
    }
  } catch (const std::bad_alloc&) {
    failed = 1;
  }
  return failed;
}

template <class Kind, class Place>
int32_t run_stack(const Kind* layers, int64_t count, const Batch* batch, const int64_t* chunks, int64_t chunk_count,
                  const float* x, float* y, int32_t threads) {
  int64_t longest = 1, most = 1;
  for (int64_t s = 0; s < batch->sequences; s++) longest = std::max(longest, batch->starts[s + 1] - batch->starts[s]);
  for (int64_t c = 0; c < chunk_count; c++)
    most = std::max(most, batch->starts[chunks[c + 1]] - batch->starts[chunks[c]]);
  const int members = chunk_count >= threads ? 1 : threads;
  const size_t bytes = Place::lay_out(nullptr, nullptr, layers, count, most, longest, members) + 64;
  auto some = [&](char* memory, int64_t chunk, Team team) {
    Place room;
    const int64_t tokens = batch->starts[chunks[chunk + 1]] - batch->starts[chunks[chunk]];
    Place::lay_out(&room, memory, layers, count, tokens, longest, members);
    run_some(layers, count, *batch, chunks[chunk], chunks[chunk + 1], x, y, room, team);
  };
  return in_blocks(chunk_count, threads, members == 1, bytes, some);
}

}  // namespace

extern "C" {

int32_t qbert_columns_of_a_tile() { return NB; }

// y [tokens, rows] = the linear map of x [tokens, columns]; 0, or 1 if there is no memory.
int32_t qbert_linear(const Matrix* m, const float* x, int64_t tokens, float* y, int32_t threads) {
  const int64_t rows = padded(m->rows, NB), stride = padded(m->wide ? m->columns * 2 : m->columns, 64);
  const int64_t columns = padded(m->columns, W);
  const int64_t at_once = std::min<int64_t>(tokens, ROWS_AT_ONCE);
  const int64_t blocks = (tokens + at_once - 1) / at_once;
  const bool alone = blocks >= threads;
  const size_t bytes = padded(at_once * stride, 64) + padded(at_once * sizeof(RowGrid), 64) + at_once * rows * 4 + columns * 4 + 256;
  auto some = [&](char* memory, int64_t block, Team team) {
    const int64_t row = tokens * block / blocks, count = tokens * (block + 1) / blocks - row;
    Codes codes = {reinterpret_cast<uint8_t*>(memory), reinterpret_cast<RowGrid*>(memory + padded(at_once * stride, 64)), stride};
    float* whole = reinterpret_cast<float*>(memory + padded(at_once * stride, 64) + padded(at_once * sizeof(RowGrid), 64));
    float* last = whole + at_once * rows;
    // The last row may be read behind its end: it is copied where that is not memory of x.
    const bool copied = row + count == tokens && columns != m->columns;
    quantize(x + row * m->columns, m->columns, copied ? count - 1 : count, *m, codes, team);
    if (copied && team.place == 0) {
      std::memcpy(last, x + (tokens - 1) * m->columns, m->columns * sizeof(float));
      Codes one = {codes.at + (count - 1) * stride, codes.grids + count - 1, stride};
      quantize(last, columns, 1, *m, one, {0, 1});
    }
    team.wait();
    if (rows == m->rows) {
      multiply(codes, count, *m, {y + row * rows, rows, false}, team);
    } else {
      multiply(codes, count, *m, {whole, rows, false}, team);
      team.wait();
      for (int64_t r = team.first(count); r < team.last(count); r++)
        std::memcpy(y + (row + r) * m->rows, whole + r * rows, m->rows * sizeof(float));
    }
  };
  return in_blocks(blocks, threads, alone, bytes, some);
}

// x [tokens, width] through `count` layers into y, of one width outside, of any heads and widths inside; chunks[i] to chunks[i + 1] are sequences that run together.
int32_t qbert_layers(const Layer* layers, int64_t count, const Batch* batch, const int64_t* chunks, int64_t chunk_count,
                     const float* x, float* y, int32_t threads) {
  return run_stack<Layer, Room>(layers, count, batch, chunks, chunk_count, x, y, threads);
}

int32_t qbert_thin_layers(const ThinLayer* layers, int64_t count, const Batch* batch, const int64_t* chunks,
                          int64_t chunk_count, const float* x, float* y, int32_t threads) {
  return run_stack<ThinLayer, ThinRoom>(layers, count, batch, chunks, chunk_count, x, y, threads);
}

}  // extern "C"
