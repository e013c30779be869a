//! Which row of the shards' tables a sequence has.

use std::collections::BTreeSet;

/// Index into the tables of the shards.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RowId(pub u32);

/// Gives out the lowest free row, so that the tables stay as small as what runs.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    free: BTreeSet<RowId>,
    num_rows: u32,
}

impl Rows {
    pub fn take(&mut self) -> RowId {
        self.free.pop_first().unwrap_or_else(|| {
            self.num_rows += 1;
            RowId(self.num_rows - 1)
        })
    }

    /// The row may be given out again from the next plan on: a release takes effect after its step.
    pub fn put_back(&mut self, row: RowId) {
        assert!(row.0 < self.num_rows && self.free.insert(row), "a row is released once");
    }

    pub fn num_taken(&self) -> usize {
        self.num_rows as usize - self.free.len()
    }
}
