// One register tile of `multiply` (product.h). Included once for each instruction set, inside a namespace of its own, with
//   CONVRNN_TARGET    the function attribute that selects the set
//   CONVRNN_VECTOR    bytes of a vector register
//   CONVRNN_REGISTERS number of vector registers
// The compiler's vector types rather than its vectoriser: only so do the sums stay in registers. (They are why the body
// stands in a file of its own: a function must carry its target attribute before vector types in it are lowered.)

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(CONVRNN_VECTOR), aligned(alignof(A)), may_alias));
  static constexpr int lanes = CONVRNN_VECTOR / sizeof(A);
  static constexpr int per_block = static_cast<int>(kColumns) / lanes;
};

// Rows of a tile of N vectors: with the vectors of b and one of a they fill the registers. More than 14 gain nothing.
constexpr int tile_rows(int n) {
  const int rows = (CONVRNN_REGISTERS - 2 - (n < 4 ? n : 1)) / n;
  return rows < 1 ? 1 : rows > 14 ? 14 : rows;
}

// Rows [0, M) and N vectors. kAlongK: a_k is 1 (else a_row is).
template <class A, int M, int N, bool kAlongK>
CONVRNN_TARGET void tile(const Factors<A>* factors, int64_t count, int64_t depth, const ProductStrides& strides, A* c,
                         bool accumulate) {
  using V = typename Vector<A>::type;
  constexpr int lanes = Vector<A>::lanes;
  V sums[M][N];
  CONVRNN_UNROLL
  for (int m = 0; m < M; ++m) {
    CONVRNN_UNROLL
    for (int n = 0; n < N; ++n) {
      sums[m][n] = V{};
    }
  }
  const int64_t row = kAlongK ? strides.a_row : 1;
  const int64_t step = kAlongK ? 1 : strides.a_k;
  const int64_t row3 = 3 * row, b_k = strides.b_k;
  for (const Factors<A>* f = factors; f < factors + count; ++f) {
    // Five rows a pointer: an address can hold 0, 1, 2, 3 (by row3) or 4 rows, and no general register is spilled.
    const A *a0 = f->a, *a5 = a0 + 5 * row, *a10 = a0 + 10 * row, *b = f->b;
    for (int64_t k = 0; k < depth; ++k, a0 += step, a5 += step, a10 += step, b += b_k) {
      V right[N];
      CONVRNN_UNROLL
      for (int n = 0; n < N; ++n) {
        right[n] = *reinterpret_cast<const V*>(b + n * lanes);
      }
      CONVRNN_UNROLL
      for (int m = 0; m < M; ++m) {
        const A* a = m < 5 ? a0 : m < 10 ? a5 : a10;
        const int r = m % 5;
        const V left = a[r == 3 ? row3 : r * row] - V{};  // in every lane
        CONVRNN_UNROLL
        for (int n = 0; n < N; ++n) {
          sums[m][n] += left * right[n];
        }
      }
    }
  }
  CONVRNN_UNROLL
  for (int m = 0; m < M; ++m) {
    CONVRNN_UNROLL
    for (int n = 0; n < N; ++n) {
      V* out = reinterpret_cast<V*>(c + m * strides.c_row + n * lanes);
      *out = accumulate ? *out + sums[m][n] : sums[m][n];
    }
  }
}

template <class A>
using Tile = void (*)(const Factors<A>*, int64_t, int64_t, const ProductStrides&, A*, bool);

// All tile heights of N vectors; [0] is the height 1.
template <class A, int N, bool kAlongK, int... kRows>
const Tile<A>* tiles(std::integer_sequence<int, kRows...>) {
  static constexpr Tile<A> found[] = {&tile<A, kRows + 1, N, kAlongK>...};
  return found;
}

// Rows in as few tiles as they fit in, of equal height but for one row.
template <class A, int kBlocks>
void multiply(const Factors<A>* factors, int64_t count, int64_t depth, int64_t rows, const ProductStrides& strides, A* c,
              bool accumulate) {
  constexpr int vectors = kBlocks * Vector<A>::per_block;
  constexpr int most = tile_rows(vectors);
  using Heights = std::make_integer_sequence<int, most>;
  const bool along_k = strides.a_k == 1;
  const Tile<A>* heights = along_k ? tiles<A, vectors, true>(Heights{}) : tiles<A, vectors, false>(Heights{});
  const int64_t parts = (rows + most - 1) / most;
  std::array<Factors<A>, kMostFactors> moved;
  std::copy(factors, factors + count, moved.begin());
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t height = (rows - first) / (parts - part);
    heights[height - 1](moved.data(), count, depth, strides, c + first * strides.c_row, accumulate);
    for (int64_t f = 0; f < count; ++f) {
      moved[f].a += height * strides.a_row;
    }
    first += height;
  }
}
