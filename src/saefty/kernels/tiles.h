// The shape of tile registers (Intel's AMX), for the files that use them.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t TILE = 16;  // rows of a tile, and float32 numbers in a row of it

struct alignas(64) Tiles {  // what the processor reads to shape its tile registers
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

}  // namespace
