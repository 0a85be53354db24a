// Products of float32 matrices on processors with tile registers (Intel's AMX), as accurate as
// float32: each number is the sum of three in bfloat16 (3 x 8 of its 24 bits), and six products of
// such parts, the largest of the nine, add up in float32. What is left out is smaller than what
// float32 rounds off. A plain C function, like those of cpu.cpp.

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "tiles.h"

namespace {

constexpr int64_t SIDE = 2 * TILE;           // rows, columns and terms that are met at a time
constexpr int64_t PARTS = 3;
constexpr int64_t PANEL = PARTS * 2 * 1024;  // bytes of 32 x 32 numbers: tiles of 1,024, part by part
constexpr int64_t TERMS = 16;                // panels of terms, and of columns, that a core's cache
constexpr int64_t COLUMNS = 8;               // holds while rows pass by
constexpr int64_t ROWS = 1024;               // rows whose parts a thread holds, of as many terms
constexpr int64_t SPLIT = 3;                 // products of 32 x 32 numbers while as many are split
constexpr uint32_t HUGE_BITS = 0x7e800000;   // 2^126: from here on, rounding could overflow
constexpr uint32_t TINY_BITS = 0x0d800000;   // 2^-100: below it, tiles take the smallest parts for 0

// The three parts of sixteen pairs of terms, each pair in one 32-bit number.
struct Pairs {
    __m512i part[PARTS];
};

// Numbers rows x terms, or terms x rows where `across`.
struct Matrix {
    const float* at;
    int64_t stride;
    bool across;
};

inline __mmask16 first_of(int64_t n) { return n >= TILE ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

inline __m512i magnitude(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// Rounds to the nearest number of 8 bits, then what that leaves, and so on. Tiles add up pairs, and
// it is all the same which terms are a pair, as long as both factors pair the same.
inline Pairs split(__m512 first, __m512 second) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    Pairs out;
    for (int64_t p = 0; p < PARTS; ++p) {
        const __m512i a = _mm512_add_epi32(_mm512_castps_si512(first), half);
        const __m512i b = _mm512_add_epi32(_mm512_castps_si512(second), half);
        // (a >> 16) | (b & upper)
        out.part[p] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, 0xf8);
        first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
        second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
    }
    return out;
}

// Exchanges rows and columns of 16 x 16 numbers.
inline void transpose(__m512i* r) {
    __m512i t[TILE];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// Splits 16 rows of a matrix and 32 terms into tiles. Rows become rows of a tile if `as_rows`, else
// its columns. Returns whether all fit.
inline bool split(const Matrix& from, int64_t row, int64_t rows, int64_t term, int64_t terms,
                  bool as_rows, char* to) {
    const __m512i least = _mm512_set1_epi32(TINY_BITS), none = _mm512_setzero_si512();
    __m512i largest = none;
    bool tiny = false;
    __m512i pairs[PARTS][TILE];
    for (int64_t i = 0; i < TILE; ++i) {
        __m512 a = _mm512_setzero_ps(), b = a;
        if (from.across) {
            const float* at = from.at + (term + i) * from.stride + row;
            const __mmask16 there = first_of(rows - row);
            if (term + i < terms) a = _mm512_maskz_loadu_ps(there, at);
            if (term + TILE + i < terms) b = _mm512_maskz_loadu_ps(there, at + TILE * from.stride);
        } else if (row + i < rows) {
            const float* at = from.at + (row + i) * from.stride + term;
            a = _mm512_maskz_loadu_ps(first_of(terms - term), at);
            b = _mm512_maskz_loadu_ps(first_of(terms - term - TILE), at + TILE);
            _mm_prefetch(at + SIDE, _MM_HINT_T0);
            _mm_prefetch(at + SIDE + TILE, _MM_HINT_T0);
        }
        const __m512i larger = _mm512_max_epi32(magnitude(a), magnitude(b));
        largest = _mm512_max_epi32(largest, larger);
        if (!from.across && !_mm512_cmpge_epi32_mask(larger, least))
            tiny |= _mm512_test_epi32_mask(larger, larger) != 0;
        const Pairs both = split(a, b);
        for (int64_t p = 0; p < PARTS; ++p) pairs[p][i] = both.part[p];
    }
    if (from.across)
        tiny = (_mm512_cmplt_epi32_mask(largest, least) & _mm512_test_epi32_mask(largest, largest)) != 0;
    for (int64_t p = 0; p < PARTS; ++p) {
        if (from.across == as_rows) transpose(pairs[p]);
        for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(to + p * 2048 + i * 64, pairs[p][i]);
    }
    return !tiny && !_mm512_cmpge_epi32_mask(largest, _mm512_set1_epi32(HUGE_BITS));
}

// Adds the product of two rows of panels to the 32 x 32 sums in tiles 0 to 3, small parts first.
inline void multiply(const char* left, const char* right, int64_t panels) {
    for (int64_t i = 0; i < panels; ++i, left += PANEL, right += PANEL) {
        const auto rows = [=](int part) {
            _tile_loadd(4, left + part * 2048, 64);
            _tile_loadd(5, left + part * 2048 + 1024, 64);
        };
        const auto columns = [=](int part) {
            _tile_loadd(6, right + part * 2048, 64);
            _tile_loadd(7, right + part * 2048 + 1024, 64);
        };
        const auto add = [] {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        };
        rows(0), columns(2), add();
        columns(1), add();
        rows(1), add();
        columns(0), add();
        rows(2), add();
        rows(0), add();
    }
}

struct Product {
    Matrix a, b;  // b by column
    const float* bias;
    int64_t m, n, k;
    float* out;
    int64_t stride;
    bool add;
};

// 32 x 32 sums of `p`, from row r and column c on: what is there so far, and `panels` of terms more.
void square(const Product& p, int64_t r, int64_t c, bool begun, const char* left, const char* right,
            int64_t panels) {
    const int64_t rows = std::min(SIDE, p.m - r), columns = std::min(SIDE, p.n - c);
    alignas(64) float edge[SIDE * SIDE];
    float* at = p.out + r * p.stride + c;
    const bool whole = rows == SIDE && columns == SIDE;
    float* sums = whole ? at : edge;
    const int64_t stride = whole ? p.stride : SIDE, low = TILE * stride;
    if (!whole) {
        std::fill(edge, edge + SIDE * SIDE, 0.0f);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                edge[i * SIDE + j] = begun ? at[i * p.stride + j] : p.bias ? p.bias[c + j] : 0.0f;
    }
    if (begun || !whole) {
        _tile_loadd(0, sums, stride * 4);
        _tile_loadd(1, sums + TILE, stride * 4);
        _tile_loadd(2, sums + low, stride * 4);
        _tile_loadd(3, sums + low + TILE, stride * 4);
    } else if (p.bias) {  // a stride of 0 gives each row of a tile the same numbers
        _tile_loadd(0, p.bias + c, 0);
        _tile_loadd(1, p.bias + c + TILE, 0);
        _tile_loadd(2, p.bias + c, 0);
        _tile_loadd(3, p.bias + c + TILE, 0);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    multiply(left, right, panels);
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + TILE, stride * 4);
    _tile_stored(2, sums + low, stride * 4);
    _tile_stored(3, sums + low + TILE, stride * 4);
    if (whole) return;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) at[i * p.stride + j] = edge[i * SIDE + j];
}

inline int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};

// A thread's memory, kept for its next product: fresh memory costs as much as filling it.
struct Room {
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;

    char* of(int64_t wanted) {
        if (wanted > bytes) {
            memory.reset(static_cast<char*>(std::aligned_alloc(64, wanted)));
            bytes = wanted;
        }
        return memory.get();
    }
};

thread_local Room rows_room, columns_room;

// Some of the rows, or of the columns, in steps of SIDE.
struct Range {
    int64_t begin, end;

    int64_t size() const { return end - begin; }

    // One of equal shares.
    Range share(int64_t number, int64_t shares) const {
        const int64_t blocks = parts_of(parts_of(size(), SIDE), shares) * SIDE;
        return {std::min(end, begin + number * blocks), std::min(end, begin + (number + 1) * blocks)};
    }
};

// The product of some rows with some columns, by one thread, which splits both by itself: what
// another one has split is slow to come by. False if numbers are too large or too small.
bool multiply(const Product& p, Range rows, Range columns) {
    if (!rows.size() || !columns.size()) return true;
    const int64_t panels = parts_of(p.k, SIDE);
    char* left = rows_room.of(parts_of(std::min(ROWS, rows.size()), SIDE) * TERMS * PANEL);
    char* right = columns_room.of(COLUMNS * TERMS * PANEL);
    bool fits = true;
    for (int64_t row = rows.begin; row < rows.end; row += ROWS)
        for (int64_t first = 0; first < panels; first += TERMS) {
            const int64_t n = std::min(TERMS, panels - first), end = std::min(row + ROWS, rows.end);
            const bool begun = p.add || first;
            for (int64_t r = row; r < end; r += SIDE)
                for (int64_t j = 0; j < 2 * n; ++j) {  // in the order of memory
                    const int64_t i = p.a.across ? j / 2 : j % n, half = p.a.across ? j % 2 : j / n;
                    fits &= split(p.a, r + half * TILE, end, (first + i) * SIDE, p.k, true,
                                  left + ((r - row) / SIDE * TERMS + i) * PANEL + half * 1024);
                }
            for (int64_t column = columns.begin; column < columns.end; column += COLUMNS * SIDE) {
                const int64_t squares = std::min(COLUMNS, parts_of(columns.end - column, SIDE));
                for (int64_t j = 0; j < 2 * squares * n; ++j) {
                    const int64_t i = p.b.across ? j / (2 * squares) : j % n;
                    const int64_t half = p.b.across ? j % (2 * squares) : j / n;
                    fits &= split(p.b, column + half * TILE, p.n, (first + i) * SIDE, p.k, false,
                                  right + (half / 2 * TERMS + i) * PANEL + half % 2 * 1024);
                }
                for (int64_t r = row; r < end; r += SIDE)
                    for (int64_t c = 0; c < squares; ++c)
                        square(p, r, column + c * SIDE, begun, left + (r - row) / SIDE * TERMS * PANEL,
                               right + c * TERMS * PANEL, n);
            }
        }
    return fits;
}

// Into how many shares rows are best cut, and columns into as many as make one for each thread.
int64_t shares_of_rows(const Product& p, int64_t threads) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t shares = 1; shares <= threads; ++shares) {
        if (threads % shares) continue;
        const int64_t rows = parts_of(parts_of(p.m, SIDE), shares);
        const int64_t columns = parts_of(parts_of(p.n, SIDE), threads / shares);
        const int64_t splits = rows + columns * parts_of(rows * SIDE, ROWS);
        const int64_t cost = rows * columns + SPLIT * splits;
        if (cost < least) best = shares, least = cost;
    }
    return best;
}

}  // namespace

extern "C" {

// out = a b + bias, or out += a b: a of m x k and b of k x n, each with one stride of 1 (the other
// is given, and whether it is the one of k). Sets `unfit`, and leaves anything in out, where a row
// or column has numbers of 2^126 and more, or none of 2^-100 and more.
void split_product(const float* a, int64_t a_stride, int64_t a_across, const float* b, int64_t b_stride,
                   int64_t b_across, const float* bias, int64_t m, int64_t n, int64_t k, float* out,
                   int64_t out_stride, int64_t add, uint8_t* unfit) {
    const Product p{{a, a_stride, a_across != 0}, {b, b_stride, b_across != 0}, bias, m, n, k, out,
                    out_stride, add != 0};
    bool fits = true;
#pragma omp parallel reduction(&& : fits)
    {
        Tiles before, mine;  // torch's own products find their tiles as they left them
        _tile_storeconfig(&before);
        _tile_loadconfig(&mine);
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t by_row = shares_of_rows(p, threads), by_column = threads / by_row;
        fits = multiply(p, Range{0, m}.share(me / by_column, by_row),
                        Range{0, n}.share(me % by_column, by_column));
        _tile_loadconfig(&before);
    }
    *unfit = !fits;
}

}  // extern "C"

#endif
