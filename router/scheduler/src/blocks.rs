//! The pool of KV-cache blocks, with reuse of full blocks that hold the same prefix.
//!
//! Knows nothing of steps: whoever releases a block vouches that no open step can touch it, whoever publishes one that
//! its content was computed. A block is either held, or empty, or cached: published and held by nobody.

use std::hash::{BuildHasher, RandomState};

use crate::planted::{Bug, Planted};
use crate::sequence::TokenId;

/// A block of the KV cache, the same on every rank.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BlockId(pub u32);

/// Whatever else keys and values depend on: adapter, inputs that are not ids, the tenant who may know of a hit.
///
/// Folded by the caller into one number that is never given to two different things.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Namespace(pub u64);

/// Never given out twice, so a child cannot be found through a parent that was evicted and replaced. The default stands
/// before every first block.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
struct ContentId(u64);

/// Identifies, together with the block's own ids, what a published block holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Content {
    id: ContentId,
    parent: ContentId,
    namespace: Namespace,
    bucket: usize,
}

/// The blocks of one sequence, in order of position.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    pub ids: Vec<BlockId>,
    /// How many leading blocks were filled by others.
    num_hits: usize,
    /// How many leading blocks can be hit, here or in another's block of the same content; and the last of these.
    num_published: usize,
    tip: ContentId,
}

#[derive(Debug, Default)]
struct Block {
    num_holders: u32,
    /// Set while the block can be hit; it is then full and never written.
    content: Option<Content>,
    next_in_bucket: Option<BlockId>,
    /// Neighbours in the order of eviction, while cached.
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

#[derive(Debug)]
pub(crate) struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    /// The ids of every published block, `block_size` for each.
    token_ids: Vec<TokenId>,
    /// Chains of published blocks whose contents share a hash. Keyed, so that no client can choose who collides.
    buckets: Vec<Option<BlockId>>,
    hasher: RandomState,
    /// Blocks without holders that nobody can hit.
    empty: Vec<BlockId>,
    /// The ends of the list of cached blocks.
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    num_cached: usize,
    num_contents: u64,
    planted: Planted,
}

impl BlockPool {
    pub fn new(num_blocks: u32, block_size: usize, planted: Planted) -> Self {
        assert!(block_size > 0, "a block holds at least one position");
        let num_slots = num_blocks as usize * block_size;
        Self {
            block_size,
            blocks: (0..num_blocks).map(|_| Block::default()).collect(),
            token_ids: vec![0; num_slots],
            buckets: vec![None; (num_blocks as usize).next_power_of_two()],
            hasher: RandomState::new(),
            empty: (0..num_blocks).rev().map(BlockId).collect(),
            oldest: None,
            newest: None,
            num_cached: 0,
            num_contents: 0,
            planted,
        }
    }

    /// Blocks that can be taken, cached ones included.
    pub fn num_free(&self) -> usize {
        self.empty.len() + self.num_cached
    }

    /// Published blocks that nobody holds.
    pub fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// Holds the published blocks of the longest prefix of `token_ids`.
    pub fn acquire_prefix(&mut self, token_ids: &[TokenId], namespace: Namespace) -> BlockTable {
        let mut table = BlockTable::default();
        for token_ids in token_ids.chunks_exact(self.block_size) {
            let bucket = self.bucket(table.tip, namespace, token_ids);
            let Some((id, content_id)) = self.find(bucket, table.tip, namespace, token_ids) else { break };
            self.hold(id);
            table.ids.push(id);
            table.tip = content_id;
        }
        (table.num_hits, table.num_published) = (table.ids.len(), table.ids.len());
        table
    }

    /// Appends blocks that nobody else holds, evicting the least recently used content. Panics if there are too few.
    pub fn grow(&mut self, table: &mut BlockTable, num_blocks: usize) {
        for _ in 0..num_blocks {
            let id = self.empty.pop().unwrap_or_else(|| self.evict());
            self.block_mut(id).num_holders += 1;
            table.ids.push(id);
        }
    }

    /// Lets others hit the blocks that `token_ids`, the computed part of the log, fill.
    pub fn publish(&mut self, table: &mut BlockTable, token_ids: &[TokenId], namespace: Namespace) {
        for token_ids in token_ids.chunks_exact(self.block_size).skip(table.num_published) {
            let bucket = self.bucket(table.tip, namespace, token_ids);
            let found = self.find(bucket, table.tip, namespace, token_ids);
            // Where another sequence was first, its block is the one to hit.
            table.tip = found.map_or_else(
                || self.index(table.ids[table.num_published], bucket, table.tip, namespace, token_ids),
                |(_, content_id)| content_id,
            );
            table.num_published += 1;
        }
    }

    /// Nobody new can hit what the holder of this table has published. Others that hold its blocks keep them.
    pub fn withdraw(&mut self, table: &BlockTable) {
        for &id in &table.ids[table.num_hits..] {
            if self.block(id).content.is_some() {
                self.unindex(id);
            }
        }
    }

    /// Gives up a sequence's hold. Its later blocks are evicted before its earlier ones.
    pub fn release(&mut self, table: BlockTable) {
        for id in table.ids.into_iter().rev() {
            let block = self.block_mut(id);
            block.num_holders = block.num_holders.checked_sub(1).expect("a block is released once by each holder");
            match block {
                Block { num_holders: 0, content: Some(_), .. } => self.push_newest(id),
                Block { num_holders: 0, content: None, .. } => self.empty.push(id),
                _ => {}
            }
        }
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    fn slots(&self, id: BlockId) -> std::ops::Range<usize> {
        let first = id.0 as usize * self.block_size;
        first..first + self.block_size
    }

    fn hold(&mut self, id: BlockId) {
        if self.block(id).num_holders == 0 && !self.planted.has(Bug::EvictsHeldBlocks) {
            self.unlink(id);
        }
        self.block_mut(id).num_holders += 1;
    }

    // The index of contents.

    fn bucket(&self, parent: ContentId, namespace: Namespace, token_ids: &[TokenId]) -> usize {
        if self.planted.has(Bug::MatchesByHashAlone) {
            return token_ids.iter().sum::<TokenId>() as usize % self.buckets.len().min(8);
        }
        // What does not decide must not tell either, or the planted bug would hide.
        let parent = if self.planted.has(Bug::IgnoresParent) { ContentId::default() } else { parent };
        let namespace = if self.planted.has(Bug::IgnoresNamespace) { Namespace::default() } else { namespace };
        self.hasher.hash_one((parent, namespace, token_ids)) as usize & (self.buckets.len() - 1)
    }

    /// The published block with this content. The hash only says where to look.
    fn find(
        &self,
        bucket: usize,
        parent: ContentId,
        namespace: Namespace,
        token_ids: &[TokenId],
    ) -> Option<(BlockId, ContentId)> {
        let mut next = self.buckets[bucket];
        while let Some(id) = next {
            let block = self.block(id);
            let content = block.content.expect("only published blocks are in a bucket");
            let is_same = (content.parent == parent || self.planted.has(Bug::IgnoresParent))
                && (content.namespace == namespace || self.planted.has(Bug::IgnoresNamespace))
                && &self.token_ids[self.slots(id)] == token_ids;
            if is_same || self.planted.has(Bug::MatchesByHashAlone) {
                return Some((id, content.id));
            }
            next = block.next_in_bucket;
        }
        None
    }

    fn index(
        &mut self,
        id: BlockId,
        bucket: usize,
        parent: ContentId,
        namespace: Namespace,
        token_ids: &[TokenId],
    ) -> ContentId {
        let slots = self.slots(id);
        self.token_ids[slots].copy_from_slice(token_ids);
        self.num_contents += 1;
        let content = Content { id: ContentId(self.num_contents), parent, namespace, bucket };
        let next_in_bucket = self.buckets[bucket].replace(id);
        let block = self.block_mut(id);
        (block.content, block.next_in_bucket) = (Some(content), next_in_bucket);
        content.id
    }

    fn unindex(&mut self, id: BlockId) {
        let Content { bucket, .. } = self.block_mut(id).content.take().expect("it is published");
        let after = self.block_mut(id).next_in_bucket.take();
        let mut at = self.buckets[bucket];
        if at == Some(id) {
            self.buckets[bucket] = after;
            return;
        }
        while let Some(before) = at {
            at = self.block(before).next_in_bucket;
            if at == Some(id) {
                self.block_mut(before).next_in_bucket = after;
                return;
            }
        }
        unreachable!("a published block is in its bucket");
    }

    // The order of eviction.

    fn evict(&mut self) -> BlockId {
        let id = self.oldest.expect("the caller has asked num_free");
        self.unlink(id);
        if !self.planted.has(Bug::FindsEvictedBlocks) {
            self.unindex(id);
        }
        id
    }

    fn push_newest(&mut self, id: BlockId) {
        let before = self.newest.replace(id);
        match before {
            Some(before) => self.block_mut(before).newer = Some(id),
            None => self.oldest = Some(id),
        }
        let block = self.block_mut(id);
        (block.older, block.newer) = (before, None);
        self.num_cached += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        let (older, newer) = (block.older.take(), block.newer.take());
        match older {
            Some(older) => self.block_mut(older).newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.block_mut(newer).older = older,
            None => self.newest = older,
        }
        self.num_cached -= 1;
    }

    /// Panics unless every block is empty, cached, or held exactly as often as `tables` say, and by one sequence alone
    /// where it can still be written. `num_read_only` tells, of each table, how many leading blocks cannot.
    pub fn check<'a>(&self, tables: impl Iterator<Item = (&'a BlockTable, usize)>) {
        let (mut num_holders, mut is_writable) = (vec![0; self.blocks.len()], vec![false; self.blocks.len()]);
        for (table, num_read_only) in tables {
            assert!(table.num_hits <= table.num_published && table.num_published <= table.ids.len());
            for (i, id) in table.ids.iter().enumerate() {
                num_holders[id.0 as usize] += 1;
                is_writable[id.0 as usize] |= i >= num_read_only;
            }
        }
        for (i, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.num_holders, num_holders[i], "block {i} is held as often as the sequences say");
            assert!(block.num_holders <= 1 || !is_writable[i], "block {i} is shared and writable");
            assert!(block.content.is_none() || !is_writable[i], "block {i} is published and writable");
        }
        let mut is_free = vec![false; self.blocks.len()];
        let mut note_free = |id: BlockId, is_cached: bool| {
            assert!(!std::mem::replace(&mut is_free[id.0 as usize], true), "{id:?} is free twice");
            let block = self.block(id);
            assert!(block.num_holders == 0 && block.content.is_some() == is_cached, "{id:?} is not free");
        };
        self.empty.iter().for_each(|&id| note_free(id, false));
        let mut num_cached = 0;
        let (mut before, mut at) = (None, self.oldest);
        while let Some(id) = at {
            note_free(id, true);
            assert_eq!(self.block(id).older, before, "the order of eviction has two directions");
            num_cached += 1;
            (before, at) = (at, self.block(id).newer);
        }
        assert_eq!((self.newest, self.num_cached), (before, num_cached), "the end of the order of eviction");
        let num_held = num_holders.iter().filter(|n| **n > 0).count();
        assert_eq!(self.num_free() + num_held, self.blocks.len(), "every block is empty, cached or held");
        let num_indexed: usize = (0..self.buckets.len()).map(|bucket| self.check_bucket(bucket)).sum();
        assert_eq!(num_indexed, self.blocks.iter().filter(|b| b.content.is_some()).count(), "published is indexed");
    }

    fn check_bucket(&self, bucket: usize) -> usize {
        let (mut num_indexed, mut at) = (0, self.buckets[bucket]);
        while let Some(id) = at {
            assert_eq!(self.block(id).content.map(|content| content.bucket), Some(bucket), "{id:?}");
            (num_indexed, at) = (num_indexed + 1, self.block(id).next_in_bucket);
        }
        num_indexed
    }
}
