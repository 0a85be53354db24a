// The k largest pre-activations of each row on processors with tile registers (Intel's AMX): the
// product in bfloat16 never leaves the cache, because what cannot be among the k largest is dropped
// where it is computed. Plain C functions, like those of cpu.cpp.

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "selection.h"

namespace {

using Latent = int64_t;

constexpr int64_t MOST_ROWS = 512;  // whose roundings and candidates stay in a core's cache

// Rounds to bfloat16 (to the nearest, ties to even); squared lengths of all, and of what was lost.
inline void round_row(const float* from, int64_t d, int16_t* to, float& squared, float& lost) {
    float length = 0.0f, missing = 0.0f;
#pragma omp simd reduction(+ : length, missing)
    for (int64_t i = 0; i < d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const uint32_t upper = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
        float kept;
        std::memcpy(&kept, &upper, sizeof kept);
        to[i] = static_cast<int16_t>(upper >> 16);
        length += from[i] * from[i];
        missing += (from[i] - kept) * (from[i] - kept);
    }
    squared = length;
    lost = missing;
}

struct Encoder {
    const float *x, *W, *b;
    const int16_t* packed;
    int64_t d, d_sae, k, most;
    float longest, farthest, largest_bias, summing, vanished;
};

// Sums of 32 rows and latents, of which no row has taken what may be among its k largest.
struct Square {
    alignas(64) float sums[SIDE * SIDE];
    Row* rows;
    int64_t n, first;
};

// One thread's part of the work.
class Worker {
   public:
    Worker(const Encoder& encoder, int64_t rows, float* values, Latent* latents, uint8_t* unsure)
        : e(encoder), room(e.most + SIDE + TILE), values(values), latents(latents), unsure(unsure),
          rounded(rows * e.d + SIDE), line(e.d), held(rows * room), exact(rows * room),
          names(rows * room), rows(rows) {
        const auto at = reinterpret_cast<uintptr_t>(rounded.data());
        a = reinterpret_cast<int16_t*>((at + 63) / 64 * 64);
    }

    // Rows for which the floor they began with was too high come back in `again`.
    void work(const int64_t* numbers, int64_t n, std::vector<int64_t>& again) {
        begin(numbers, n);
        const int64_t blocks = (n + SIDE - 1) / SIDE;
        Square *next = &squares[0], *done = &squares[1];
        done->n = 0;
        for (int64_t first = 0; first < e.d_sae; first += SIDE)
            for (int64_t block = 0; block < blocks; ++block) {
                next->rows = &rows[block * SIDE];
                next->n = std::min(SIDE, n - block * SIDE);
                next->first = first;
                multiply(block, blocks, *next, *done);
                std::swap(next, done);
            }
        collect(*done, 0, SIDE);
        finish(n, again);
        scratch.clear();
        for (int64_t r : sure)
            if (rows[r].norm > 0) scratch.push_back(rows[r].floor / rows[r].norm);
        if (guess != NONE || scratch.empty()) return;
        const auto low = scratch.begin() + scratch.size() / 64;
        std::nth_element(scratch.begin(), low, scratch.end());
        guess = std::max(0.0f, 0.9f * *low);
    }

    // Where rows begin, relative to their norms; else at all that is positive.
    float guess = NONE;

   private:
    void begin(const int64_t* numbers, int64_t n) {
        std::fill(a + n / SIDE * SIDE * e.d, a + (n + SIDE - 1) / SIDE * SIDE * e.d, 0);
        for (int64_t r = 0; r < n; ++r) {
            float squared, lost;
            round_row(e.x + numbers[r] * e.d, e.d, line.data(), squared, lost);
            // Tiles of 16 rows and 32 inputs, two of them below each other: what is loaded together
            // lies together.
            int16_t* to = a + r / SIDE * SIDE * e.d + r % SIDE * SIDE;
            for (int64_t i = 0; i < e.d; i += SIDE) std::copy_n(&line[i], SIDE, to + i * SIDE);
            const float norm = std::sqrt(squared) + e.vanished, gone = std::sqrt(lost) + e.vanished;
            // What rounding the sums does counts for both products; 0.01 % is for the norms' own.
            const float bound = (gone * e.longest + (norm + gone) * e.farthest +
                                 (norm * e.longest + e.largest_bias) * e.summing * e.d) * 1.0001f;
            const bool known = bound < INFINITE;
            const float least = guess == NONE ? -bound : std::max(-bound, guess * norm);
            const float floor = known ? least : INFINITE;
            rows[r] = {numbers[r], norm, bound, floor, floor, floor, 0, &held[r * room], &names[r * room]};
            unsure[numbers[r]] = !known;
        }
    }

    // Multiplies into `to`, and meanwhile, as the tiles have units of their own, collects from `done`.
    void multiply(int64_t block, int64_t blocks, Square& to, const Square& done) {
        const int16_t *left = a + block * SIDE * e.d, *right = e.packed + to.first * e.d;
        const int16_t *low = right + TILE * e.d, *ahead = right + SIDE * e.d;
        const float* bias = e.b + to.first;  // a stride of 0 gives each row of a tile the same numbers
        _tile_loadd(0, bias, 0);
        _tile_loadd(1, bias + TILE, 0);
        _tile_loadd(2, bias, 0);
        _tile_loadd(3, bias + TILE, 0);
        const int64_t steps = e.d / SIDE, each = (SIDE + steps - 1) / steps;
        const int64_t lines = (SIDE + blocks - 1) / blocks;
        for (int64_t step = 0; step < steps; ++step) {
            // Every other time from the end: what was read last is still in the first cache.
            const int64_t at = (block % 2 ? steps - 1 - step : step) * SIDE;
            _tile_loadd(4, left + at * SIDE, 64);
            _tile_loadd(6, right + at * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, low + at * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + at * SIDE + TILE * SIDE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            for (int64_t i = 0; i < lines; ++i)
                _mm_prefetch(ahead + ((block * steps + step) * lines + i) * SIDE, _MM_HINT_T1);
            collect(done, step * each, (step + 1) * each);
        }
        _tile_stored(0, to.sums, SIDE * 4);
        _tile_stored(1, to.sums + TILE, SIDE * 4);
        _tile_stored(2, to.sums + TILE * SIDE, SIDE * 4);
        _tile_stored(3, to.sums + TILE * SIDE + TILE, SIDE * 4);
    }

    void collect(const Square& done, int64_t from, int64_t end) {
        const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i left = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(done.first)), counting);
        const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(TILE));
        for (int64_t r = from; r < std::min(end, done.n); ++r) {
            Row& row = done.rows[r];
            const __m512 least = _mm512_set1_ps(row.floor);
            const __m512 one = _mm512_load_ps(done.sums + r * SIDE);
            const __m512 two = _mm512_load_ps(done.sums + r * SIDE + TILE);
            const __mmask16 in_one = _mm512_cmp_ps_mask(one, least, _CMP_GE_OQ);
            const __mmask16 in_two = _mm512_cmp_ps_mask(two, least, _CMP_GE_OQ);
            if (!(in_one | in_two)) continue;
            row.add(in_one, one, left);
            row.add(in_two, two, right);
            if (row.n <= e.most) continue;
            row.tighten(e.k);
            if (row.n <= e.most - SIDE) continue;
            unsure[row.number] = 1;
            row.give_up();
        }
    }

    // Whether a row's candidates hold its k largest for certain; one that began too high goes again.
    bool holds(Row& row, std::vector<int64_t>& again) {
        if (unsure[row.number]) return false;
        row.certain = row.tighten(e.k);
        const bool too_high = row.n < e.k || row.certain - 2 * row.bound < row.begun;
        if (!(too_high && row.begun > -row.bound)) return true;
        again.push_back(row.number);
        return false;
    }

    // Computes candidates anew. Those that reach what k rough numbers reach come first: once k exact
    // ones are known, a rough number below the least of them by more than its bound is out.
    void finish(int64_t n, std::vector<int64_t>& again) {
        sure.clear();
        for (int64_t r = 0; r < n; ++r)
            if (holds(rows[r], again)) sure.push_back(r);
        places.clear();
        for (int64_t r : sure)
            for (int64_t c = 0; c < rows[r].n; ++c) {
                exact[r * room + c] = NONE;
                if (rows[r].values[c] >= rows[r].certain) places.push_back(r * room + c);
            }
        compute();
        places.clear();
        for (int64_t r : sure) {
            const Row& row = rows[r];
            if (row.n <= e.k) continue;
            const float least = kth_largest(&exact[r * room], row.n, e.k) - row.bound;
            for (int64_t c = 0; c < row.n; ++c)
                if (row.values[c] < row.certain && row.values[c] >= least)
                    places.push_back(r * room + c);
        }
        compute();
        for (int64_t r : sure) write(rows[r], &exact[r * room]);
    }

    // The exact values of candidates, by latent: the rows are in cache, and the weights are not.
    void compute() {
        starts.assign(e.d_sae + 1, 0);
        for (int32_t place : places) ++starts[names[place] + 1];
        for (int64_t i = 0; i < e.d_sae; ++i) starts[i + 1] += starts[i];
        order.resize(places.size());
        for (int32_t place : places) order[starts[names[place]]++] = place;
        const int64_t n = order.size();
        for (int64_t p = 0; p < n;) {
            const int32_t latent = names[order[p]];
            const int64_t end = starts[latent];
            if (end < n) {
                const float* ahead = e.W + names[order[end]] * e.d;
                for (int64_t i = 0; i < e.d; i += TILE) _mm_prefetch(ahead + i, _MM_HINT_T1);
            }
            while (p < end) p += end - p >= 4 ? together<4>(p, latent) : together<1>(p, latent);
        }
    }

    template <int N>
    int64_t together(int64_t p, int64_t latent) {
        const float* inputs[N];
        float sums[N];
        for (int n = 0; n < N; ++n) inputs[n] = e.x + rows[order[p + n] / room].number * e.d;
        dots<N>(inputs, e.W + latent * e.d, e.d, sums);
        for (int n = 0; n < N; ++n) exact[order[p + n]] = sums[n] + e.b[latent];
        return N;
    }

    // Of equal ones the lower latent goes first: candidates stand by latent.
    void write(const Row& row, const float* scores) {
        float* to = values + row.number * e.k;
        Latent* who = latents + row.number * e.k;
        std::fill(to, to + e.k, 0.0f);
        std::fill(who, who + e.k, 0);
        for (int64_t c = 0; c < row.n; c += TILE) {
            const __m512 found = _mm512_maskz_loadu_ps(first_of(row.n - c), scores + c);
            const __m512i rank = ranks(scores, row.n, c);
            __mmask16 in = _mm512_cmplt_epi32_mask(rank, _mm512_set1_epi32(static_cast<int>(e.k)));
            in = _mm512_mask_cmp_ps_mask(in & first_of(row.n - c), found, _mm512_set1_ps(NONE), _CMP_GT_OQ);
            alignas(64) int32_t place[TILE];
            _mm512_store_si512(place, rank);
            for (; in; in &= in - 1) {
                const int i = __builtin_ctz(in);
                to[place[i]] = scores[c + i];
                who[place[i]] = row.latents[c + i];
            }
        }
    }

    const Encoder& e;
    int64_t room;
    float* values;
    Latent* latents;
    uint8_t* unsure;
    std::vector<int16_t> rounded, line;
    std::vector<float> held, exact, scratch;
    std::vector<int32_t> names, places, order, starts;
    std::vector<int64_t> sure;
    std::vector<Row> rows;
    int16_t* a;
    Square squares[2];
};

}  // namespace

extern "C" {

// Asks the system for the tile registers; 0 if there are none.
int64_t tiles_ready() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// Weights rounded to bfloat16 in the order in which tiles take them (16 latents side by side, pairs
// of inputs below each other), the squared length of each row, and that of what rounding lost.
void packed(const float* W, int64_t d_sae, int64_t d, int16_t* packed, float* squared, float* lost) {
#pragma omp parallel
    {
        std::vector<int16_t> rough(TILE * d);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d_sae; i += TILE) {
            for (int64_t n = 0; n < TILE; ++n)
                round_row(W + (i + n) * d, d, &rough[n * d], squared[i + n], lost[i + n]);
            int16_t* to = packed + i * d;
            for (int64_t pair = 0; pair < d; pair += 2)
                for (int64_t n = 0; n < TILE; ++n, to += 2)
                    std::memcpy(to, &rough[n * d + pair], 2 * sizeof *to);
        }
    }
}

// The k largest of each row by float32 pre-activations, of equal ones the lower latent first. d and
// d_sae are multiples of 32. A row of which the bfloat16 product decides too little, or that is not
// finite, is left alone, and unsure[row] is set.
void tile_topk(const float* x, const float* W, const int16_t* packed, const float* b, int64_t n_rows,
               int64_t d, int64_t d_sae, int64_t k, int64_t most, float longest, float farthest,
               float largest_bias, float summing, float vanished, float* values, Latent* latents,
               uint8_t* unsure) {
    const Encoder encoder{x,       W,        b,            packed,  d,       d_sae, k, most,
                          longest, farthest, largest_bias, summing, vanished};
    std::vector<int64_t> numbers(n_rows);
    for (int64_t row = 0; row < n_rows; ++row) numbers[row] = row;
#pragma omp parallel
    {
        Tiles before, mine;  // torch's own products find their tiles as they left them
        _tile_storeconfig(&before);
        _tile_loadconfig(&mine);
        const int64_t share = (n_rows / omp_get_num_threads() + SIDE - 1) / SIDE * SIDE;
        const int64_t size = std::min(MOST_ROWS, std::max(SIDE, share));
        Worker worker(encoder, size, values, latents, unsure);
        std::vector<int64_t> again, none;
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < n_rows; first += size)
            worker.work(&numbers[first], std::min(size, n_rows - first), again);
        for (int64_t first = 0; first < static_cast<int64_t>(again.size()); first += size) {
            worker.guess = NONE;
            worker.work(&again[first], std::min<int64_t>(size, again.size() - first), none);
        }
        _tile_loadconfig(&before);
    }
}

}  // extern "C"

#else

extern "C" int64_t tiles_ready() { return 0; }

#endif
