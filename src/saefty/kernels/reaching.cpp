// Which entries of rows x d_sae exceed a floor, found from a rough product and decided in float32.
// Plain C functions as in cpu.cpp. Every number is written by one thread and every sum done in a
// fixed order: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sums.h"

namespace {

// Of each of two arrays, what stays in cache beside the other.
constexpr int64_t BLOCK_NUMBERS = 1 << 18;

inline float widened(int16_t number) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t>(number)) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// Calls found(column) for each flag that is set, eight at a time where none is.
template <typename Found>
inline void each_set(const uint8_t* flags, int64_t n, Found found) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        std::memcpy(&word, flags + i, sizeof word);
        for (; word; word &= word - 1) found(i + (__builtin_ctzll(word) >> 3));
    }
    for (; i < n; ++i)
        if (flags[i]) found(i);
}

}  // namespace

extern "C" {

// Row by row, the latents whose pre-activation can exceed their floor, given rough ones without the
// bias, and how far these can be off: by `bounds`, and by `rounding` relative to them. What is not a
// number counts as if it could. latents[row * d_sae], counts[row].
void may_reach(const int16_t* rough, const float* floors, const float* bounds, int64_t rows,
               int64_t d_sae, float rounding, int32_t* latents, int64_t* counts) {
#pragma omp parallel
    {
        std::vector<uint8_t> flags(d_sae);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const int16_t* pre = rough + row * d_sae;
            const float bound = bounds[row];
            uint8_t* set = flags.data();
#pragma omp simd
            for (int64_t i = 0; i < d_sae; ++i) {
                const float number = widened(pre[i]);
                const float most = number + std::fabs(number) * rounding + bound;
                set[i] = !(most < floors[i]);
            }
            int32_t* mine = latents + row * d_sae;
            int64_t n = 0;
            each_set(set, d_sae, [&](int64_t i) { mine[n++] = static_cast<int32_t>(i); });
            counts[row] = n;
        }
    }
}

// Of those, what exceeds its floor in float32; latents and counts shrink to it.
void reach(const float* x, const float* W, const float* b, const float* floors, int64_t rows,
           int64_t d_in, int64_t d_sae, int32_t* latents, int64_t* counts, float* values) {
    // Latent by latent, because the rows stay in cache and the weights do not.
    std::vector<int64_t> starts(d_sae + 1, 0);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < counts[row]; ++c) ++starts[latents[row * d_sae + c] + 1];
    for (int64_t i = 0; i < d_sae; ++i) starts[i + 1] += starts[i];
    struct Place {
        int32_t row, entry;
    };
    std::vector<Place> places(starts[d_sae]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < counts[row]; ++c)
            places[next[latents[row * d_sae + c]]++] = {static_cast<int32_t>(row),
                                                        static_cast<int32_t>(c)};
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 64)
        for (int64_t i = 0; i < d_sae; ++i)
            for (int64_t p = starts[i]; p < starts[i + 1]; ++p)
                values[places[p].row * d_sae + places[p].entry] =
                    dot(x + places[p].row * d_in, W + i * d_in, d_in) + b[i];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            int32_t* mine = latents + row * d_sae;
            float* pre = values + row * d_sae;
            int64_t n = 0;
            for (int64_t c = 0; c < counts[row]; ++c) {
                const float value = pre[c];
                const int32_t latent = mine[c];
                pre[n] = value;
                mine[n] = latent;
                n += value > floors[latent];
            }
            counts[row] = n;
        }
    }
}

// Rows of a table side by side: offsets[row] is where a row's entries begin.
void joined(const int32_t* latents, const float* values, const int64_t* offsets, int64_t rows,
            int64_t d_sae, int64_t* indices, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t n = offsets[row + 1] - offsets[row];
        std::copy(values + row * d_sae, values + row * d_sae + n, out + offsets[row]);
        std::copy(latents + row * d_sae, latents + row * d_sae + n, indices + offsets[row]);
    }
}

// The entries of each row by descending value, of equal ones the lower latent first.
void descending(float* values, int64_t* indices, const int64_t* offsets, int64_t rows) {
#pragma omp parallel
    {
        std::vector<std::pair<float, int64_t>> entries;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t begin = offsets[row], n = offsets[row + 1] - begin;
            entries.resize(n);
            for (int64_t i = 0; i < n; ++i) entries[i] = {-values[begin + i], indices[begin + i]};
            std::sort(entries.begin(), entries.end());
            for (int64_t i = 0; i < n; ++i) {
                values[begin + i] = -entries[i].first;
                indices[begin + i] = entries[i].second;
            }
        }
    }
}

// `latent_gradients` of cpu.cpp, and the same sums in the same order, but a block of rows at a time:
// where many latents fire in a row, reading rows from cache is worth more than writing once.
void latent_gradients_by_rows(const float* values, const float* by_value, const int64_t* row_of,
                              const int64_t* starts, const int64_t* order, const float* x,
                              const float* error, int64_t rows, int64_t d_sae, int64_t d,
                              float scale, const float* W_dec, int64_t tangent, float* grad_enc,
                              float* grad_dec, float* grad_bias, float* squared) {
    const int64_t block = std::max<int64_t>(1, BLOCK_NUMBERS / d);
    std::vector<int64_t> next(starts, starts + d_sae);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d_sae * d; ++i) grad_enc[i] = grad_dec[i] = 0.0f;
        for (int64_t stop = block; stop < rows + block; stop += block) {
#pragma omp for schedule(dynamic, 64)
            for (int64_t i = 0; i < d_sae; ++i) {
                const int64_t begin = next[i];
                int64_t end = begin;
                while (end < starts[i + 1] && row_of[order[end]] < stop) ++end;
                next[i] = end;
                add_all(
                    grad_enc + i * d, begin, end, d,
                    [&](int64_t p) { return x + row_of[order[p]] * d; },
                    [&](int64_t p) { return by_value[order[p]]; });
                add_all(
                    grad_dec + i * d, begin, end, d,
                    [&](int64_t p) { return error + row_of[order[p]] * d; },
                    [&](int64_t p) { return values[order[p]] * scale; });
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d_sae; ++i) {
            float *enc = grad_enc + i * d, *dec = grad_dec + i * d, bias = 0.0f;
            for (int64_t p = starts[i]; p < starts[i + 1]; ++p) bias += by_value[order[p]];
            grad_bias[i] = bias;
            squared[i] = ended(enc, dec, bias, tangent ? W_dec + i * d : nullptr, d);
        }
    }
}

// `reconstruct` of cpu.cpp for rows whose latents ascend, and the same sums in the same order, but a
// tile of rows at a time and in it latent by latent: each row of W_dec is read once a tile.
void reconstruct_by_tiles(const float* values, const int64_t* latents, const int64_t* offsets,
                          const float* W_dec, const float* b_dec, const float* x, int64_t rows,
                          int64_t d, int64_t d_sae, float* error, float* dots) {
    const int64_t tile = std::max<int64_t>(1, BLOCK_NUMBERS / 2 / d);
#pragma omp parallel
    {
        std::vector<int64_t> starts(d_sae + 1);
        struct Place {
            int64_t row, entry;
        };
        std::vector<Place> places;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < rows; first += tile) {
            const int64_t last = std::min(first + tile, rows), begin = offsets[first];
            const int64_t end = offsets[last];
            std::fill(starts.begin(), starts.end(), 0);
            for (int64_t e = begin; e < end; ++e) ++starts[latents[e] + 1];
            for (int64_t i = 0; i < d_sae; ++i) starts[i + 1] += starts[i];
            places.resize(end - begin);
            for (int64_t row = first; row < last; ++row) {
                for (int64_t e = offsets[row]; e < offsets[row + 1]; ++e)
                    places[starts[latents[e]]++] = {row, e};
                float* sum = error + row * d;
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) sum[i] = b_dec[i] - x[row * d + i];
            }
            for (const Place& place : places) {
                const float* from = W_dec + latents[place.entry] * d;
                const float value = values[place.entry];
                float* sum = error + place.row * d;
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) sum[i] += value * from[i];
            }
            for (const Place& place : places)
                dots[place.entry] =
                    dot(error + place.row * d, W_dec + latents[place.entry] * d, d);
        }
    }
}

}  // extern "C"
