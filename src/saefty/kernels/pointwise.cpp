// What JumpReLU and gated latents are, and their slopes, for all entries of some rows: each number
// is read and written once. Sums over rows are done column by column in the order of the rows, so
// that results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t COLUMNS = 256;

// Calls each(row, first, last) for every row of every block of columns, a block by one thread.
template <typename Each>
void by_columns(int64_t rows, int64_t d_sae, Each each) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < d_sae; first += COLUMNS) {
        const int64_t last = std::min(first + COLUMNS, d_sae);
        for (int64_t row = 0; row < rows; ++row) each(row * d_sae, first, last);
    }
}

}  // namespace

extern "C" {

// z = relu(pre) where pre > threshold, else 0.
void jump(const float* pre, const float* threshold, int64_t rows, int64_t d_sae, float* z) {
    by_columns(rows, d_sae, [=](int64_t row, int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            const float number = pre[row + i];
            z[row + i] = number > threshold[i] ? std::max(number, 0.0f) : 0.0f;
        }
    });
}

// slope: by z before, by pre after. by_threshold and firing (how many exceed their thresholds) are
// sums over the rows.
void jump_slopes(const float* pre, const float* threshold, int64_t rows, int64_t d_sae,
                 float half_window, float height, float weight, float* slope, float* by_threshold,
                 float* firing) {
    std::fill(by_threshold, by_threshold + d_sae, 0.0f);
    std::fill(firing, firing + d_sae, 0.0f);
    by_columns(rows, d_sae, [=](int64_t row, int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            const float number = pre[row + i], at = threshold[i], by_z = slope[row + i];
            const float near = std::fabs(number - at) < half_window ? height : 0.0f;
            by_threshold[i] -= near * (at * by_z + weight);
            firing[i] += number > at ? 1.0f : 0.0f;
            slope[row + i] = number > std::max(at, 0.0f) ? by_z : 0.0f;
        }
    });
}

// z = relu(scale (pre - b_gate) + b_mag) where pre > 0, else 0; opened = relu(pre).
void gate(const float* pre, const float* scale, const float* b_gate, const float* b_mag,
          int64_t rows, int64_t d_sae, float* z, float* opened) {
    by_columns(rows, d_sae, [=](int64_t row, int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            const float number = pre[row + i];
            const float magnitude = scale[i] * (number - b_gate[i]) + b_mag[i];
            z[row + i] = number > 0.0f ? std::max(magnitude, 0.0f) : 0.0f;
            opened[row + i] = std::max(number, 0.0f);
        }
    });
}

// slope: by z before, by pre after. What follows by_opened are sums over the rows.
void gate_slopes(const float* pre, const float* z, const float* scale, const float* b_gate,
                 int64_t rows, int64_t d_sae, float weight, float* slope, const float* by_opened,
                 float* by_b_gate, float* by_b_mag, float* by_r_mag, float* open) {
    for (float* sum : {by_b_gate, by_b_mag, by_r_mag, open}) std::fill(sum, sum + d_sae, 0.0f);
    by_columns(rows, d_sae, [=](int64_t row, int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            const float number = pre[row + i];
            const float by_gate = number > 0.0f ? by_opened[row + i] + weight : 0.0f;
            const float by_magnitude = z[row + i] > 0.0f ? slope[row + i] : 0.0f;
            const float scaled = by_magnitude * scale[i];
            by_b_gate[i] += by_gate;
            by_b_mag[i] += by_magnitude;
            by_r_mag[i] += scaled * (number - b_gate[i]);
            open[i] += number > 0.0f ? number : 0.0f;
            slope[row + i] = scaled + by_gate;
        }
    });
}

}  // extern "C"
