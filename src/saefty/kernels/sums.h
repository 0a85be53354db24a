// What the compiled kernels share: the order of candidates, and sums in a fixed order of terms, so
// that kernels that sum the same numbers give the same bits.

#pragma once

#include <cstdint>

namespace {

struct Candidate {
    float value;
    int32_t latent;
};

// Larger values first, of equal ones the lower latent.
inline bool precedes(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.latent < b.latent);
}

// Several sums side by side: one alone would wait for each addition to end.
constexpr int64_t LANES = 64;

inline float dot(const float* a, const float* b, int64_t d) {
    float sums[LANES] = {};
    const int64_t whole = d - d % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
#pragma omp simd
        for (int64_t j = 0; j < LANES; ++j) sums[j] += a[i + j] * b[i + j];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < LANES; ++j) sum += sums[j];
    for (int64_t i = whole; i < d; ++i) sum += a[i] * b[i];
    return sum;
}

inline void add_scaled(float* out, const float* row, float factor, int64_t d) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] += factor * row[i];
}

// out += sum of factor(e) * row(e) for e in [begin, end), four at a time: out is read and written
// less often.
template <typename Row, typename Factor>
inline void add_all(float* out, int64_t begin, int64_t end, int64_t d, Row row, Factor factor) {
    int64_t e = begin;
    for (; e + 4 <= end; e += 4) {
        const float *r0 = row(e), *r1 = row(e + 1), *r2 = row(e + 2), *r3 = row(e + 3);
        const float f0 = factor(e), f1 = factor(e + 1), f2 = factor(e + 2), f3 = factor(e + 3);
#pragma omp simd
        for (int64_t i = 0; i < d; ++i)
            out[i] = (((out[i] + f0 * r0[i]) + f1 * r1[i]) + f2 * r2[i]) + f3 * r3[i];
    }
    for (; e < end; ++e) add_scaled(out, row(e), factor(e), d);
}

// Ends both sums of a latent: with `unit`, takes out of dec what is parallel to it. Returns the
// squared length of the three gradients. It is never inlined, so that all callers get the same bits.
__attribute__((noinline)) inline float ended(const float* enc, float* dec, float bias,
                                             const float* unit, int64_t d) {
    if (unit) add_scaled(dec, unit, -dot(dec, unit, d), d);
    return dot(enc, enc, d) + dot(dec, dec, d) + bias * bias;
}

}  // namespace
