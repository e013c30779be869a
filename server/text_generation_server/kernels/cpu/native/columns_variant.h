// The inner loop of GPTQ for one instruction set (Frantar et al. 2022, arXiv:2210.17323, algorithm 1). Included after
// layer_variant.h.
//
// A vector of outputs goes through all columns by itself, so bits do not depend on threads.

void round_columns(const Columns &run, int64_t first, int64_t last) {
    float inverse[kMostColumns];
    for (int64_t i = 0; i < run.num; i++) inverse[i] = 1.0f / run.upper[i * run.upper_stride + i];
    const F most = all_floats(run.most);
    each_vector(last - first, [&](int64_t offset, auto load, auto store) {
        const int64_t at = first + offset, count = std::min<int64_t>(kWidth, last - at);
        F column[kMostColumns];
        for (int64_t i = 0; i < run.num; i++) column[i] = load(run.weight, kF32, i * run.outputs + at);
        for (int64_t i = 0; i < run.num; i++) {
            const int64_t to = i * run.outputs + at;
            const F now = column[i];
            const F scale = load(run.scale, kF32, i * run.grid_stride + at), zero = load(run.zero, kF32, i * run.grid_stride + at);
            const F code = minimum(maximum(round_to_whole(zero + now / scale), zeros()), most);
            const F error = (now - (code - zero) * scale) * all_floats(inverse[i]);
            const float *row = run.upper + i * run.upper_stride;
            for (int64_t j = i + 1; j < run.num; j++) column[j] = subtract_product(error, all_floats(row[j]), column[j]);
            store(run.weight, kF32, to, now);
            store(run.errors, kF32, to, error);
            float codes[kWidth];
            store_floats(codes, code);
            for (int64_t k = 0; k < count; k++) run.codes[to + k] = uint8_t(codes[k]);
        }
    });
}
