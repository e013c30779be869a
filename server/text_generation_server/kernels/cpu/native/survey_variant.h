// What drawing ids asks of logits, for one instruction set. Included after layer_variant.h.

constexpr uint32_t kAllBits = (uint32_t(1) << kWidth) - 1;

// `function(at, values, bits)` for each vector of a row; the last one's values behind the end are `padding`. `bits`: which
// ids of the vector may be drawn. Ends early once it returns true.
template <class Function>
INLINE void each_part(const float *row, int64_t size, const uint32_t *mask, float padding, Function &&function) {
    // A vector is a whole part of a word.
    auto bits = [&](int64_t at) { return mask ? mask[at / 32] >> (at % 32) & kAllBits : kAllBits; };
    int64_t at = 0;
    for (; at + kWidth <= size; at += kWidth)
        if (function(at, load_floats(row + at), bits(at))) return;
    if (const int64_t rest = size - at) {
        float part[kWidth];
        std::fill(part, part + kWidth, padding);
        std::memcpy(part, row + at, rest * sizeof(float));
        function(at, load_floats(part), bits(at) & ((uint32_t(1) << rest) - 1));
    }
}

void survey(const Survey &s, int64_t first, int64_t last) {
    // Sums of this many values are taken in float32, and added up in float64.
    constexpr int64_t kSpan = 64 * kWidth;
    const F nothing = all_floats(-INFINITY);
    for (int64_t row = first; row < last; row++) {
        const float *raw = s.raw + row * s.size, *processed = s.processed + row * s.size;
        const uint32_t *mask = s.mask_of[row] < 0 ? nullptr : s.masks + s.mask_of[row] * s.words;
        F highest = nothing, wrong = zeros();
        each_part(raw, s.size, nullptr, raw[0], [&](int64_t, F values, uint32_t) {
            highest = maximum(highest, values);
            // What is not finite is no number times zero.
            wrong = add_product(values, zeros(), wrong);
            return false;
        });
        float most = highest_of(highest);
        const bool finite = add_up(wrong) == 0;
        double total = 0;
        F sum = zeros();
        each_part(raw, s.size, nullptr, -INFINITY, [&](int64_t at, F values, uint32_t) {
            sum = sum + exponential(values - all_floats(most));
            if (at % kSpan == kSpan - kWidth) {
                total += add_up(sum);
                sum = zeros();
            }
            return false;
        });
        s.normalizers[row] = float(most + std::log(total + add_up(sum)));
        if (mask || processed != raw) {
            highest = nothing;
            uint32_t numbers = kAllBits;
            each_part(processed, s.size, mask, -INFINITY, [&](int64_t, F values, uint32_t bits) {
                const F possible = pick(bits, values, nothing);
                highest = maximum(highest, possible);
                numbers &= equal_bits(possible, possible);
                return false;
            });
            most = numbers == kAllBits ? highest_of(highest) : NAN;
        }
        int64_t id = 0;
        each_part(processed, s.size, mask, -INFINITY, [&](int64_t at, F values, uint32_t bits) {
            const uint32_t equal = equal_bits(values, all_floats(most)) & bits;
            if (equal) id = at + __builtin_ctz(equal);
            return equal != 0;
        });
        s.ids[row] = id;
        s.states[row] = uint8_t((finite ? kFinite : 0) | (std::isfinite(most) ? kHasId : 0));
    }
}
