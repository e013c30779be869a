// What every product of one instruction set needs, whatever it multiplies with. Included inside the variant's namespace, after
// its vectors F and I of kWidth floats and of as many 32-bit integers. Everything has internal linkage.

constexpr int kVectors = kColumns / kWidth;
constexpr int kMicroColumns = 2 * kWidth;

// Bytes from what is read to what is asked for.
constexpr int64_t kAhead = 2048;

// Of every instruction set alike.
INLINE void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at + kAhead, _MM_HINT_T0); }
INLINE void prefetch(const uint8_t *at, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) prefetch(at + line);
}

// A processor reads a stream ahead by itself, but not from one page into the next, and asking for every line keeps it from doing
// so: of a step of so many bytes that begins in a page, only the beginning of the next page is asked for.
template <int64_t Bytes>
INLINE void prefetch_page(const uint8_t *at) {
    constexpr int64_t kPage = 4096, kLines = 4;
    const int64_t within = int64_t(reinterpret_cast<uintptr_t>(at) % kPage);
    if (within < Bytes)
        for (int64_t line = 0; line < kLines; line++) _mm_prefetch((const char *)at - within + kPage + 64 * line, _MM_HINT_T1);
}

INLINE float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

template <class Function, int... J>
INLINE void unrolled(std::integer_sequence<int, J...>, Function &&function) {
    (function(std::integral_constant<int, J>{}), ...);
}

template <int N, class Function>
INLINE void repeat(Function &&function) {
    unrolled(std::make_integer_sequence<int, N>{}, std::forward<Function>(function));
}

// Scales and zero points of one vector of columns in one group.
struct Group {
    const Weight &weight;
    int64_t at;  // of the group's first column

    INLINE F scale(int column) const {
        switch (weight.scale_type) {
            case kF16: return widen_float16((const uint16_t *)weight.scales + at + column);
            case kBf16: return widen_bfloat16((const uint16_t *)weight.scales + at + column);
            default: return load_floats((const float *)weight.scales + at + column);
        }
    }
    INLINE F zero(int column) const {
        return weight.zeros ? widen_bytes(weight.zeros + at + column) : all_floats(weight.middle);
    }
    // The same as integers.
    INLINE void zeros_of(I *to) const {
        repeat<kVectors>([&](auto v) {
            to[v] = weight.zeros ? bytes_to_integers(weight.zeros + at + v * kWidth) : all(int32_t(weight.middle));
        });
    }
    // The sum over groups after this one, whose products with plain codes add up to `partial`.
    INLINE F add(F sum, F partial, int column, const float *x_sum) const {
        if (x_sum) partial = subtract_product(zero(column), all_floats(*x_sum), partial);
        return add_product(scale(column), partial, sum);
    }
};

INLINE void put(const Rows &rows, const Weight &weight, int64_t row, int64_t column, F value) {
    int64_t wanted = weight.out_features - column, at = row * weight.out_features + column;
    if (wanted <= 0) return;
    if (wanted >= kWidth) {
        if (rows.y32) store_floats(rows.y32 + at, value);
        else store_bfloat16(rows.y16 + at, value);
    } else if (rows.y32) {
        float part[kWidth];
        store_floats(part, value);
        std::memcpy(rows.y32 + at, part, wanted * sizeof(float));
    } else {
        uint16_t part[kWidth];
        store_bfloat16(part, value);
        std::memcpy(rows.y16 + at, part, wanted * sizeof(uint16_t));
    }
}
