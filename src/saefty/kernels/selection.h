// What is selected of a row's rough pre-activations, in vectors of 16 (AVX-512), for tiles.cpp.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "tiles.h"

namespace {

constexpr int64_t SIDE = 2 * TILE;  // a product is computed that many rows and latents at a time
constexpr float INFINITE = std::numeric_limits<float>::infinity(), NONE = -INFINITE;

inline __mmask16 first_of(int64_t n) { return n >= TILE ? 0xffff : (1u << n) - 1; }

// N products of rows with the same weights, each summed in the same order; d is a multiple of 32.
template <int N>
inline void dots(const float* const* rows, const float* W, int64_t d, float* out) {
    __m512 even[N], odd[N];
    for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < d; i += SIDE) {
        const __m512 left = _mm512_loadu_ps(W + i), right = _mm512_loadu_ps(W + i + TILE);
        for (int n = 0; n < N; ++n) {
            even[n] = _mm512_fmadd_ps(_mm512_loadu_ps(rows[n] + i), left, even[n]);
            odd[n] = _mm512_fmadd_ps(_mm512_loadu_ps(rows[n] + i + TILE), right, odd[n]);
        }
    }
    for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(_mm512_add_ps(even[n], odd[n]));
}

// How many of n numbers go before each of 16 from `first` on: the larger ones, and of equal ones
// those before it.
inline __m512i ranks(const float* numbers, int64_t n, int64_t first) {
    const __m512 mine = _mm512_maskz_loadu_ps(first_of(n - first), numbers + first);
    const __m512i one = _mm512_set1_epi32(1);
    __m512i found = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; ++i) {
        const __m512 other = _mm512_set1_ps(numbers[i]);
        __mmask16 before = _mm512_cmp_ps_mask(other, mine, _CMP_GT_OQ);
        if (i < first + TILE) {
            const __mmask16 behind = i < first ? 0xffff : 0xfffe << (i - first);
            before |= _mm512_mask_cmp_ps_mask(behind, other, mine, _CMP_EQ_OQ);
        }
        found = _mm512_mask_add_epi32(found, before, found, one);
    }
    return found;
}

// The k-th largest of n numbers (k <= n).
inline float kth_largest(const float* numbers, int64_t n, int64_t k) {
    for (int64_t first = 0;; first += TILE) {
        const __m512i wanted = _mm512_set1_epi32(static_cast<int>(k - 1));
        const __m512i found = ranks(numbers, n, first);
        const __mmask16 hit = _mm512_mask_cmpeq_epi32_mask(first_of(n - first), found, wanted);
        if (hit) return numbers[first + __builtin_ctz(hit)];
    }
}

// A row's rough pre-activations from `floor` on.
struct Row {
    int64_t number;
    float norm, bound, begun, floor, certain;
    int64_t n;
    float* values;
    int32_t* latents;

    void add(__mmask16 mask, __m512 found, __m512i names) {
        _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(mask, found));
        _mm512_storeu_si512(latents + n, _mm512_maskz_compress_epi32(mask, names));
        n += __builtin_popcount(mask);
    }

    // A number that at least k of those here reach, and hardly more (n >= k).
    float reached(int64_t k) const {
        _mm512_storeu_ps(values + n, _mm512_set1_ps(NONE));
        __m512 largest = _mm512_loadu_ps(values);
        for (int64_t i = TILE; i < n; i += TILE) largest = _mm512_max_ps(largest, _mm512_loadu_ps(values + i));
        float low = floor, high = _mm512_reduce_max_ps(largest);
        for (int step = 0; step < 14; ++step) {
            const float middle = 0.5f * (low + high);
            const __m512 least = _mm512_set1_ps(middle);
            int64_t count = 0;
            for (int64_t i = 0; i < n; i += TILE)
                count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), least, _CMP_GE_OQ));
            (count >= k ? low : high) = middle;
        }
        return low;
    }

    // Drops what cannot be among the k largest; returns what at least k of the others reach.
    float tighten(int64_t k) {
        if (n < k) return floor;
        const float least = reached(k);
        floor = std::max(floor, least - 2 * bound);
        const __m512 lowest = _mm512_set1_ps(floor);
        int64_t end = n;
        n = 0;
        for (int64_t i = 0; i < end; i += TILE) {
            const __m512 found = _mm512_loadu_ps(values + i);
            const __m512i names = _mm512_loadu_si512(latents + i);
            add(_mm512_mask_cmp_ps_mask(first_of(end - i), found, lowest, _CMP_GE_OQ), found, names);
        }
        return least;
    }

    void give_up() {
        n = 0;
        floor = INFINITE;
    }
};

}  // namespace
