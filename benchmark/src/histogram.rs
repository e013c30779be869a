//! Durations by the million in constant memory.

/// Bits of precision: a bucket is at most 1/128 wide, relative to its value.
const PRECISION: u32 = 7;
const SUB_BUCKETS: usize = 1 << PRECISION;
/// Values from 2^42 (73 minutes in nanoseconds) on share the last bucket.
const MAX_BITS: u32 = 42;
const NUM_BUCKETS: usize = (MAX_BITS - PRECISION + 1) as usize * SUB_BUCKETS;

/// Counts of values in buckets whose width grows with the value; exact below 128.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; NUM_BUCKETS], count: 0, sum: 0, max: 0 }
    }
}

impl Histogram {
    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.count += 1;
        self.sum += u128::from(value);
        self.max = self.max.max(value);
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// Values counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest value, exactly.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The mean, exactly; zero without values.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum as f64 / self.count as f64 }
    }

    /// The smallest value that at least `share` of all values do not exceed (nearest rank), to 1/256; zero without
    /// values.
    pub fn percentile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index).min(self.max);
            }
        }
        self.max
    }
}

fn bucket(value: u64) -> usize {
    let value = value.min((1 << MAX_BITS) - 1);
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(PRECISION + 1);
    // Above 2^8 the leading bit is always set, so that each doubling fills one run of 128 buckets.
    shift as usize * SUB_BUCKETS + (value >> shift) as usize
}

fn middle(index: usize) -> u64 {
    if index < 2 * SUB_BUCKETS {
        return index as u64;
    }
    let shift = index / SUB_BUCKETS - 1;
    let base = (index - shift * SUB_BUCKETS) as u64;
    (base << shift) + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        values.into_iter().for_each(|value| histogram.record(value));
        histogram
    }

    fn assert_close(found: u64, expected: u64) {
        let distance = found.abs_diff(expected) as f64 / expected.max(1) as f64;
        assert!(distance <= 1.0 / 256.0, "found {found}, expected {expected}");
    }

    /// `x = [pow(7, i, 1_000_003) * 1000 for i in range(1, 5001)]` and
    /// `numpy.percentile(x, [50, 90, 99, 100], method="inverted_cdf")`, `numpy.mean(x)`.
    #[test]
    fn percentiles_equal_those_of_numpy() {
        let mut power = 1u64;
        let histogram = of((0..5000).map(|_| {
            power = power * 7 % 1_000_003;
            power * 1000
        }));
        for (share, expected) in NUMPY {
            assert_close(histogram.percentile(share), expected);
        }
        assert!((histogram.mean() - NUMPY_MEAN).abs() < 1e-3);
    }

    const NUMPY: [(f64, u64); 4] = [(0.5, 497_562_000), (0.9, 907_648_000), (0.99, 990_874_000), (1.0, 999_872_000)];
    const NUMPY_MEAN: f64 = 500_001_115.6;

    #[test]
    fn small_values_are_exact() {
        // numpy.percentile([3, 1, 2, 4], [25, 50, 75, 76], method="inverted_cdf") = 1, 2, 3, 4.
        let histogram = of([3, 1, 2, 4]);
        assert_eq!([0.25, 0.5, 0.75, 0.76].map(|share| histogram.percentile(share)), [1, 2, 3, 4]);
    }

    #[test]
    fn every_value_is_within_its_bucket_and_buckets_rise() {
        let mut last = 0;
        for exponent in 0..41 {
            for value in [1u64 << exponent, (1 << exponent) + (1 << exponent) / 3, (2 << exponent) - 1] {
                assert_close(middle(bucket(value)), value);
                assert!(bucket(value) >= last);
                last = bucket(value);
            }
        }
        assert!(last < NUM_BUCKETS);
    }

    #[test]
    fn merged_histograms_count_as_one() {
        let mut merged = of(1..=50);
        merged.merge(&of(51..=100));
        assert_eq!((merged.count(), merged.percentile(0.9), merged.max()), (100, 90, 100));
    }

    #[test]
    fn an_empty_histogram_and_a_huge_value_are_answered() {
        assert_eq!(Histogram::default().percentile(0.99), 0);
        assert_eq!(of([u64::MAX]).max(), u64::MAX);
    }
}
