// Compiled with -mavx2 -mfma -mf16c.
#include "layer.h"
#include "sampling.h"

#include "avx2_vectors.h"
#include "linear_variant.h"
#include "layer_variant.h"
#include "sampling_variant.h"
#include "columns_variant.h"

}  // namespace

const Variant kAvx2{"avx2", kTable4Bytes, spread, multiply, &kPairsOfCodes, nullptr, nullptr, &kLayerAvx2, &kSamplingAvx2};
const LayerVariant kLayerAvx2{rms_norm, silu_and_mul, rotate, sum, add, attend, round_columns};
const SamplingVariant kSamplingAvx2{row_statistics, weigh_row, leave_allowed, not_below, largest_of, penalize_row};

}  // namespace kernels
