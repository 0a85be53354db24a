// Sums by latent, a slice of the columns at a time: what all rows have in a slice stays in a core's
// cache, where rows are met in no order. Plain C functions, like those of cpu.cpp.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sums.h"

namespace {

constexpr int64_t WIDTH = 16;                          // numbers of a vector
constexpr int64_t CACHED = (1 << 20) / sizeof(float);  // numbers, half of a core's second cache

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

// Entries by latent, with one factor each.
struct Entries {
    const int64_t* starts;
    const int32_t* rows;
    const float* factors;
};

// out[latent] = sum of factor * slice[row] over its entries, in their order; N vectors a row.
template <int N>
void sum_slice(const Vector* slice, Entries entries, int64_t begin, int64_t end, int64_t d,
               int64_t width, float* out) {
    for (int64_t i = begin; i < end; ++i) {
        Vector sum[N] = {};
        for (int64_t p = entries.starts[i]; p < entries.starts[i + 1]; ++p) {
            const Vector* row = slice + entries.rows[p] * N;
            const float factor = entries.factors[p];
            for (int n = 0; n < N; ++n) sum[n] += factor * row[n];
        }
        if (width == N * WIDTH)
            std::memcpy(out + i * d, sum, sizeof sum);
        else
            std::memcpy(out + i * d, sum, width * sizeof(float));
    }
}

// Both sums of all latents; a thread takes a slice of one of them at a time.
template <int N>
void sum_slices(const float* const* from, const Entries* entries, int64_t n_rows, int64_t d_sae,
                int64_t d, float* const* to) {
    const int64_t most = N * WIDTH, slices = (d + most - 1) / most;
    const int64_t parts = (omp_get_max_threads() + 2 * slices - 1) / (2 * slices);
#pragma omp parallel
    {
        std::vector<Vector> slice(n_rows * N);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < 2 * slices * parts; ++task) {
            const int64_t which = task / parts / slices, first = task / parts % slices * most;
            const int64_t width = std::min(most, d - first), part = task % parts;
            for (int64_t r = 0; r < n_rows; ++r)
                std::memcpy(&slice[r * N], from[which] + r * d + first, width * sizeof(float));
            sum_slice<N>(slice.data(), entries[which], d_sae * part / parts,
                         d_sae * (part + 1) / parts, d, width, to[which] + first);
        }
    }
}

}  // namespace

extern "C" {

// What latent_gradients of cpu.cpp gives, to the last bit.
void latent_gradients_by_slices(const float* values, const float* by_value, const int64_t* row_of,
                                const int64_t* starts, const int64_t* order, const float* x,
                                const float* error, int64_t n_rows, int64_t d_sae, int64_t d,
                                float scale, const float* W_dec, int64_t tangent, float* grad_enc,
                                float* grad_dec, float* grad_bias, float* squared) {
    const int64_t n = starts[d_sae];
    std::vector<int32_t> rows(n);
    std::vector<float> slopes(n), scaled(n);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < n; ++p) {
        rows[p] = static_cast<int32_t>(row_of[order[p]]);
        slopes[p] = by_value[order[p]];
        scaled[p] = values[order[p]] * scale;
    }
    const Entries entries[] = {{starts, rows.data(), slopes.data()}, {starts, rows.data(), scaled.data()}};
    const float* from[] = {x, error};
    float* to[] = {grad_enc, grad_dec};
    (n_rows * 8 * WIDTH <= CACHED ? sum_slices<8> : sum_slices<4>)(from, entries, n_rows, d_sae, d, to);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < d_sae; ++i) {
        float *enc = grad_enc + i * d, *dec = grad_dec + i * d, bias = 0.0f;
        for (int64_t p = starts[i]; p < starts[i + 1]; ++p) bias += slopes[p];
        grad_bias[i] = bias;
        squared[i] = ended(enc, dec, bias, tangent ? W_dec + i * d : nullptr, d);
    }
}

}  // extern "C"
