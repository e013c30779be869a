// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl, and all of AVX2's.
#include "layer.h"

#include "avx512_vectors.h"
#include "linear_variant.h"
#include "layer_variant.h"
#include "survey_variant.h"

}  // namespace

const Variant kAvx512{"avx512", kTable4, spread, multiply, nullptr};
const LayerVariant kLayerAvx512{rms_norm, silu_and_mul, rotate, add, survey, attend};

}  // namespace kernels
