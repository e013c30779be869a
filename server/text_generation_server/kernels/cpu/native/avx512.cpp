// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl, and all of AVX2's.
#include "layer.h"
#include "sampling.h"

#include "avx512_vectors.h"
#include "linear_variant.h"
#include "layer_variant.h"
#include "sampling_variant.h"
#include "columns_variant.h"

}  // namespace

const Variant kAvx512{"avx512", kTable4, spread, multiply, &kPairsOfCodes, nullptr, nullptr, &kLayerAvx512, &kSamplingAvx512};
const LayerVariant kLayerAvx512{rms_norm, silu_and_mul, rotate, sum, add, attend, round_columns};
const SamplingVariant kSamplingAvx512{row_statistics, weigh_row, leave_allowed, not_below, largest_of, penalize_row};

}  // namespace kernels
