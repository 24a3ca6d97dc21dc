// Grouped fp32 products on a CPU, made for experts with few rows each: `grouped_gemm.py` compiles and calls this file.
//
//   forward  out[r] = x[r] · w[e]        dgrad  dx[r] = dy[r] · w[e]ᵀ        wgrad  dw[e] = x_eᵀ · dy_e
//
// A product of M rows does 2·M operations on each of its weights. With few rows it waits for memory, unless weights are
// read in the order in which they lie there, once, and while others are multiplied; a library packs a matrix first.
//
// All three are made of one `tile`: ROWS × COLUMNS sums that stay in registers for all steps of a contraction. Its right
// side is packed: COLUMNS floats for each step, side by side.
//
//            left side                right side                            result
//   forward  x, as it lies            w, packed by the first tile of many    out, a block of DEPTH rows of w after another
//   dgrad    w, as it lies            dyᵀ of the expert, packed before       dxᵀ, turned into dx at the end
//   wgrad    x, ROWS of its columns   dy of the expert, packed before        dw, in the order of memory
//
// With the rows of one tile or fewer forward goes another way, `forward_of_few`: then there is nothing to do but read.
// An element is the same sum in the same order whatever rows are beside it, and whatever the number of threads.
//
// Axes: R rows sorted by expert, M those of one expert, E experts, K contracted width, N output width.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

#if defined(FLOATS_IN_A_REGISTER)  // tests, which try all of them on any machine
constexpr int LANES = FLOATS_IN_A_REGISTER;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int COLUMNS = 2 * LANES;  // two vectors; one where no more columns are left
constexpr int ROWS = LANES == 16 ? 12 : 6;  // its sums, the two vectors and a broadcast fill the registers
constexpr int64_t DEPTH = 64;       // rows of w that forward multiplies before the rows after them
constexpr int64_t MOST_ROWS = 256;  // that dgrad turns at a time: they stay in the cache
constexpr int STEPS = 8;                // rows of w that forward keeps in registers where an expert has few rows
constexpr int64_t FAR_AHEAD = 1 << 13;  // floats that it fetches ahead
#if defined(LARGE_FROM)                 // tests, whose products are small
constexpr int64_t LARGE = LARGE_FROM;
#else
constexpr int64_t LARGE = 1 << 23;      // floats: more than a cache holds
#endif
constexpr int LINE = 64 / sizeof(float);  // of the cache

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

#define ALWAYS_INLINE __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

ALWAYS_INLINE inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
ALWAYS_INLINE inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// Past the cache, to a multiple of the vector's size, where the processor can.
#if defined(__AVX512F__)
constexpr bool STREAMS = LANES == 16;
#elif defined(__AVX__)
constexpr bool STREAMS = LANES == 8;
#else
constexpr bool STREAMS = false;
#endif
ALWAYS_INLINE inline void stream(float* to, Vector value) {
#if defined(__AVX512F__)
    __m512 whole;
    std::memcpy(&whole, &value, std::min(sizeof whole, sizeof value));
    _mm512_stream_ps(to, whole);
#elif defined(__AVX__)
    __m256 whole;
    std::memcpy(&whole, &value, std::min(sizeof whole, sizeof value));
    _mm256_stream_ps(to, whole);
#else
    store(to, value);
#endif
}

// What a thread has streamed is seen by others after this.
inline void streams_end() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

enum class Left { AS_IT_LIES, PACKED };     // element (i, k) at left[i · left_stride + k], or at left[k · ROWS + i]
enum class Right { PACKED, TO_BE_PACKED };  // step k at right[k · its columns], or at right[k · right_stride]

struct Operands {
    int64_t depth = 0;  // steps of the contraction
    const float* left = nullptr;
    int64_t left_stride = 0;
    const float* right = nullptr;
    int64_t right_stride = 0;
    float* packed = nullptr;  // where a right side goes that is to be packed
    float* result = nullptr;
    int64_t result_stride = 0;
    int columns = 0;               // of the result; the right side may have more, which nobody reads
    bool add = false;              // to what is there
    bool past_cache = false;       // the result, of whole vectors: what it would push out is read sooner
    const float* ahead = nullptr;  // memory to fetch meanwhile, a line of the cache at each of the first steps
    int64_t lines_ahead = 0;
};

template <int TILE_ROWS, int VECTORS, Left LEFT, Right RIGHT>
void tile(const Operands& of) {
    constexpr bool WRITTEN_NEXT = LEFT == Left::PACKED;  // wgrad fetches what it will write
    Vector sums[TILE_ROWS][VECTORS] = {};
    const bool whole_vectors = of.columns == VECTORS * LANES;
    if (of.add) {
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            const float* from = of.result + i * of.result_stride;
            if (whole_vectors) {
                UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] = load(from + v * LANES);
            } else {
                float row[VECTORS * LANES] = {};
                std::copy_n(from, of.columns, row);
                UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] = load(row + v * LANES);
            }
        }
    }
    const float *left = of.left, *right = of.right;
    const int64_t left_stride = of.left_stride, depth = of.depth;
    const int64_t right_stride = RIGHT == Right::PACKED ? VECTORS * LANES : of.right_stride;
    float* packed = of.packed;
    const auto step = [&](int64_t k) ALWAYS_INLINE {
        Vector vectors[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vectors[v] = load(right + k * right_stride + v * LANES);
            if constexpr (RIGHT == Right::TO_BE_PACKED) store(packed + (k * VECTORS + v) * LANES, vectors[v]);
        }
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            const float factor = LEFT == Left::PACKED ? left[k * ROWS + i] : left[i * left_stride + k];
            UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] += factor * vectors[v];
        }
    };
    if (!of.add && !of.past_cache)  // the results to the right come next
        UNROLL for (int i = 0; i < TILE_ROWS; i++) __builtin_prefetch(of.result + i * of.result_stride + COLUMNS, 1, 3);
    int64_t k = 0;
    const float* ahead = of.ahead;
    for (const int64_t fetched = std::min(of.lines_ahead, depth); k < fetched; k++, ahead += LINE) {
        __builtin_prefetch(ahead, WRITTEN_NEXT, 2);
        step(k);
    }
    for (; k < depth; k++) step(k);

    UNROLL for (int i = 0; i < TILE_ROWS; i++) {
        float* to = of.result + i * of.result_stride;
        if (whole_vectors) {
            UNROLL for (int v = 0; v < VECTORS; v++)
                STREAMS && of.past_cache ? stream(to + v * LANES, sums[i][v]) : store(to + v * LANES, sums[i][v]);
        } else {
            float row[VECTORS * LANES];
            UNROLL for (int v = 0; v < VECTORS; v++) store(row + v * LANES, sums[i][v]);
            std::copy_n(row, of.columns, to);
        }
    }
}

// The tile of so many rows: their number is known to the compiler, which keeps the sums in registers.
template <int VECTORS, Left LEFT, Right RIGHT, int TILE_ROWS = ROWS>
ALWAYS_INLINE inline void tile_of(int rows, const Operands& operands) {
    if (rows == TILE_ROWS) return tile<TILE_ROWS, VECTORS, LEFT, RIGHT>(operands);
    if constexpr (TILE_ROWS > 1) tile_of<VECTORS, LEFT, RIGHT, TILE_ROWS - 1>(rows, operands);
}

// Memory that one thread packs into, kept for its next call.
class Scratch {
   public:
    float* floats(size_t count) {
        if (count > size_) {
            size_ = (count + LINE - 1) / LINE * LINE;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float))));
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t size_ = 0;
};

thread_local Scratch packed_right, packed_left, turned_result, sums_of_few;

// [depth, width] into panels [depth, COLUMNS]; the last one ends in zeros.
void pack(const float* from, int64_t stride, int64_t depth, int64_t width, float* panels) {
    for (int64_t k = 0; k < depth; k++, from += stride)
        for (int64_t j = 0; j < width; j += COLUMNS) {
            float* to = panels + j * depth + k * COLUMNS;
            if (width - j >= COLUMNS) {
                store(to, load(from + j)), store(to + LANES, load(from + j + LANES));
            } else {
                std::fill_n(to, COLUMNS, 0.f);
                std::copy_n(from + j, width - j, to);
            }
        }
}

// Swaps the blocks of H lanes across the diagonal of a square of vectors; all H from 1 on together transpose it.
template <int H, size_t... LANE>
ALWAYS_INLINE inline void swap_blocks(Vector (&square)[LANES], std::index_sequence<LANE...>) {
    UNROLL for (int i = 0; i < LANES; i++) {
        if (i & H) continue;
        const Vector upper = square[i], lower = square[i + H];
        square[i] = __builtin_shufflevector(upper, lower, (LANE & H ? LANES + LANE - H : LANE)...);
        square[i + H] = __builtin_shufflevector(upper, lower, (LANE & H ? LANES + LANE : LANE + H)...);
    }
}

// to[j, i] = from[i, j] for [rows, columns]. Vectors are read and written up to `square_rows` and `square_columns`,
// multiples of LANES: where a side has more than there is, `to` gets zeros or `from` has floats behind its columns.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride,
               int64_t square_rows, int64_t square_columns) {
    constexpr auto lanes = std::make_index_sequence<LANES>();
    for (int64_t i = 0; i < square_rows; i += LANES)
        for (int64_t j = 0; j < square_columns; j += LANES) {
            Vector square[LANES];
            UNROLL for (int r = 0; r < LANES; r++)
                square[r] = i + r < rows ? load(from + (i + r) * from_stride + j) : Vector{};
            swap_blocks<1>(square, lanes);
            swap_blocks<2>(square, lanes);
            if constexpr (LANES > 4) swap_blocks<4>(square, lanes);
            if constexpr (LANES > 8) swap_blocks<8>(square, lanes);
            UNROLL for (int r = 0; r < LANES; r++)
                if (j + r < columns) store(to + (j + r) * to_stride + i, square[r]);
        }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < square_rows ? square_columns : 0; j < columns; j++)
            to[j * to_stride + i] = from[i * from_stride + j];
}

int64_t whole(int64_t count, int64_t of) { return count / of * of; }
int64_t parts(int64_t count, int64_t of) { return (count + of - 1) / of; }

// out[M, N] = x[M, K] · w[K, N]; `more` weights lie behind these, and are fetched at the end.
void forward(const float* x, const float* w, float* out, int64_t M, int64_t K, int64_t N, bool more) {
    float* packed = packed_right.floats(DEPTH * COLUMNS);
    const int64_t row_tiles = parts(M, ROWS), tiles = row_tiles * parts(N, COLUMNS);
    for (int64_t k = 0; k < K; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, K - k);
        const int64_t depth_ahead = k + DEPTH < K ? std::min(DEPTH, K - k - DEPTH) : more ? std::min(DEPTH, K) : 0;
        const int64_t lines_ahead = depth_ahead * N / LINE;
        int64_t tile_index = 0;
        for (int64_t n = 0; n < N; n += COLUMNS) {
            const int columns = std::min<int64_t>(COLUMNS, N - n);
            if (columns < COLUMNS) pack(w + k * N + n, N, depth, columns, packed);
            for (int64_t t = 0; t < row_tiles; t++, tile_index++) {
                const int64_t m = t * M / row_tiles, fetched = tile_index * lines_ahead / tiles;
                const int rows = (t + 1) * M / row_tiles - m;
                Operands of;
                of.depth = depth;
                of.left = x + m * K + k, of.left_stride = K;
                of.result = out + m * N + n, of.result_stride = N, of.columns = columns, of.add = k > 0;
                of.ahead = w + (k + depth) * N + fetched * LINE;
                of.lines_ahead = (tile_index + 1) * lines_ahead / tiles - fetched;
                if (t == 0 && columns == COLUMNS) {
                    of.right = w + k * N + n, of.right_stride = N, of.packed = packed;
                    tile_of<2, Left::AS_IT_LIES, Right::TO_BE_PACKED>(rows, of);
                } else {
                    of.right = packed;
                    tile_of<2, Left::AS_IT_LIES, Right::PACKED>(rows, of);
                }
            }
        }
    }
}

// The same for rows of one tile, where K and N are whole: w as it lies, in registers, STEPS of its rows at a time, and
// the sums in the cache. That reads memory in its order, as a processor fetches by itself, and adds in the same order.
void forward_of_few(const float* x, const float* w, float* out, int64_t M, int64_t K, int64_t N) {
    const int64_t stride = N + LANES;  // not a power of two: such rows push each other out of the cache
    float* sums = sums_of_few.floats(M * stride);
    std::fill_n(sums, M * stride, 0.f);
    for (int64_t k = 0; k < K; k += STEPS)
        for (int64_t n = 0; n < N; n += LANES) {
            Vector weights[STEPS];
            UNROLL for (int q = 0; q < STEPS; q++) {
                weights[q] = load(w + (k + q) * N + n);
                __builtin_prefetch(w + k * N + n * STEPS + q * LANES + FAR_AHEAD, 0, 2);
            }
            for (int64_t m = 0; m < M; m++) {
                float* to = sums + m * stride + n;
                Vector sum = load(to);
                UNROLL for (int q = 0; q < STEPS; q++) sum += x[m * K + k + q] * weights[q];
                store(to, sum);
            }
        }
    for (int64_t m = 0; m < M; m++) std::copy_n(sums + m * stride, N, out + m * N);
}

// dx[M, K] = dy[M, N] · w[K, N]ᵀ, for up to MOST_ROWS rows: as dxᵀ = w · dyᵀ.
void dgrad(const float* dy, const float* w, float* dx, int64_t M, int64_t K, int64_t N, bool more) {
    float* panels = packed_right.floats(parts(M, COLUMNS) * COLUMNS * N);
    float* turned = turned_result.floats(parts(M, COLUMNS) * COLUMNS * K);
    const auto width_from = [&](int64_t m) { return M - m > LANES ? COLUMNS : LANES; };
    for (int64_t m = 0; m < M; m += COLUMNS) {
        const int64_t width = width_from(m), rows = std::min<int64_t>(width, M - m);
        transpose(dy + m * N, N, rows, N, panels + m * N, width, width, whole(N, LANES));
    }
    for (int64_t k = 0; k < K; k += ROWS) {  // these rows of w stay in the cache for all of dyᵀ
        const int rows = std::min<int64_t>(ROWS, K - k);
        for (int64_t m = 0; m < M; m += COLUMNS) {
            Operands of;
            of.depth = N;
            of.left = w + k * N, of.left_stride = N;
            of.right = panels + m * N;
            of.result = turned + m * K + k * COLUMNS, of.result_stride = COLUMNS, of.columns = width_from(m);
            if (m == 0 && (more || k + 2 * ROWS <= K)) of.ahead = w + (k + ROWS) * N, of.lines_ahead = rows * N / LINE;
            if (of.columns == COLUMNS)
                tile_of<2, Left::AS_IT_LIES, Right::PACKED>(rows, of);
            else
                tile_of<1, Left::AS_IT_LIES, Right::PACKED>(rows, of);
        }
    }
    for (int64_t m = 0; m < M; m += COLUMNS) {
        const int64_t width = width_from(m), columns = std::min<int64_t>(width, M - m);
        transpose(turned + m * K, COLUMNS, K, columns, dx + m * K, K, whole(K, LANES), width);
    }
}

// dw[K, N] = x[M, K]ᵀ · dy[M, N]
void wgrad(const float* x, const float* dy, float* dw, int64_t M, int64_t K, int64_t N, bool past_cache) {
    if (M == 0) {
        std::fill_n(dw, K * N, 0.f);
        return;
    }
    float *panels = packed_right.floats(M * parts(N, COLUMNS) * COLUMNS), *left = packed_left.floats(M * ROWS);
    pack(dy, N, M, N, panels);
    for (int64_t k = 0; k < K; k += ROWS) {
        const int rows = std::min<int64_t>(ROWS, K - k);
        for (int64_t m = 0; m < M; m++) std::copy_n(x + m * K + k, rows, left + m * ROWS);
        for (int64_t n = 0; n < N; n += COLUMNS) {
            const int columns = std::min<int64_t>(COLUMNS, N - n);
            Operands of;
            of.depth = M;
            of.left = left;
            of.right = panels + n * M;
            of.result = dw + k * N + n, of.result_stride = N, of.columns = columns;
            of.past_cache = past_cache;
            if (!past_cache && k + 2 * ROWS <= K) of.ahead = dw + (k + ROWS) * N + n * ROWS, of.lines_ahead = ROWS * COLUMNS / LINE;
            tile_of<2, Left::PACKED, Right::PACKED>(rows, of);
        }
    }
}

// work(e, its first row, its rows) for every expert, each by one thread.
template <typename Work>
void for_each_expert(const int32_t* ends, int64_t E, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    const auto run = [&] {
        for (int64_t e; (e = next++) < E;) {
            const int64_t first = e ? ends[e - 1] : 0;
            work(e, first, ends[e] - first);
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < std::min<int64_t>(threads, E); i++) others.emplace_back(run);
    run();
    for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

void grouped_forward(const float* x, const float* w, float* out, const int32_t* ends, int64_t E, int64_t K, int64_t N,
                     int threads) {
    for_each_expert(ends, E, threads, [&](int64_t e, int64_t first, int64_t M) {
        const float *rows = x + first * K, *weights = w + e * K * N;
        if (M && M <= ROWS && K % STEPS == 0 && N % LANES == 0)
            forward_of_few(rows, weights, out + first * N, M, K, N);
        else if (M)
            forward(rows, weights, out + first * N, M, K, N, e + 1 < E);
    });
}

void grouped_dgrad(const float* dy, const float* w, float* dx, const int32_t* ends, int64_t E, int64_t K, int64_t N,
                   int threads) {
    for_each_expert(ends, E, threads, [&](int64_t e, int64_t first, int64_t M) {
        for (int64_t m = 0; m < M; m += MOST_ROWS)
            dgrad(dy + (first + m) * N, w + e * K * N, dx + (first + m) * K, std::min(MOST_ROWS, M - m), K, N, e + 1 < E);
    });
}

void grouped_wgrad(const float* x, const float* dy, float* dw, const int32_t* ends, int64_t E, int64_t K, int64_t N,
                   int threads) {
    const bool past_cache = STREAMS && E * K * N > LARGE && N % COLUMNS == 0 && reinterpret_cast<uintptr_t>(dw) % 64 == 0;
    for_each_expert(ends, E, threads, [&](int64_t e, int64_t first, int64_t M) {
        wgrad(x + first * K, dy + first * N, dw + e * K * N, M, K, N, past_cache);
        streams_end();
    });
}
}
