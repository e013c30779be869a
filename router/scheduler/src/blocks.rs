//! The pool of KV-cache blocks, with reuse of full blocks that hold the same prefix.
//!
//! Knows nothing of steps: whoever releases a block vouches that no open step can touch it, whoever publishes one that
//! its content was computed.

use std::collections::{BTreeSet, HashMap};

use crate::planted::{Planted, planted};
use crate::sequence::TokenId;

/// Index of a block in the cache of every rank.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BlockId(pub u32);

/// Whatever else the keys and values depend on: adapter, inputs that are not ids, the tenant who may know of a hit.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Namespace(pub u64);

/// Never given out twice, so a child cannot be found through a parent that was evicted and replaced.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct ContentId(u64);

/// Identifies the content of a full block: everything before it, and its own tokens.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Content {
    parent: Option<ContentId>,
    namespace: Namespace,
    token_ids: Vec<TokenId>,
}

/// The blocks of one sequence, in order of position.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    pub ids: Vec<BlockId>,
    /// How many leading blocks are published, and the content of the last of them.
    num_published: usize,
    tip: Option<ContentId>,
}

#[derive(Debug, Default)]
struct Block {
    num_holders: u32,
    /// Set once the block is full and may be shared.
    content: Option<(Content, ContentId)>,
    /// Full and perhaps held by several, but no longer to be found: what it holds is not to be trusted.
    is_withdrawn: bool,
    /// Orders eviction.
    released_at: u64,
}

#[derive(Debug)]
pub(crate) struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    /// Blocks without holders, least recently released first. Those with content can still be hit.
    free: BTreeSet<(u64, BlockId)>,
    cached: HashMap<Content, (BlockId, ContentId)>,
    num_contents: u64,
    num_releases: u64,
    /// Blocks with content and without a holder.
    num_cached_free: usize,
    planted: Planted,
}

impl BlockPool {
    pub fn new(num_blocks: u32, block_size: usize, planted: Planted) -> Self {
        assert!(block_size > 0);
        Self {
            block_size,
            blocks: (0..num_blocks).map(|_| Block::default()).collect(),
            free: (0..num_blocks).map(|id| (0, BlockId(id))).collect(),
            cached: HashMap::new(),
            num_contents: 0,
            num_releases: 0,
            num_cached_free: 0,
            planted,
        }
    }

    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be given out, cached ones included.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Those of the free that hold something that can be hit.
    pub fn num_cached(&self) -> usize {
        self.num_cached_free
    }

    /// What identifies the block that follows `parent`.
    fn content(&self, parent: Option<ContentId>, namespace: Namespace, token_ids: &[TokenId]) -> Content {
        Content {
            parent: if planted!(self.planted, ForgetsParent) { None } else { parent },
            namespace: if planted!(self.planted, ForgetsNamespace) { Namespace(0) } else { namespace },
            token_ids: token_ids.to_vec(),
        }
    }

    /// Holds the cached blocks of the longest prefix of `token_ids`.
    pub fn acquire_prefix(&mut self, token_ids: &[TokenId], namespace: Namespace) -> BlockTable {
        let mut table = BlockTable::default();
        for token_ids in token_ids.chunks_exact(self.block_size) {
            let content = self.content(table.tip, namespace, token_ids);
            let Some(&(block, content_id)) = self.cached.get(&content) else { break };
            self.hold(block);
            table.ids.push(block);
            table.tip = Some(content_id);
        }
        table.num_published = table.ids.len();
        table
    }

    /// Appends blocks that nobody else holds, evicting the least recently used content. Panics if there are too few.
    pub fn grow(&mut self, table: &mut BlockTable, num_blocks: usize) {
        for _ in 0..num_blocks {
            let (_, id) = self.free.pop_first().expect("the caller has asked num_free");
            let block = &mut self.blocks[id.0 as usize];
            if let Some((content, _)) = block.content.take() {
                self.cached.remove(&content);
                self.num_cached_free -= 1;
            }
            block.is_withdrawn = false;
            block.num_holders = 1;
            table.ids.push(id);
        }
    }

    /// Lets others hit the blocks that the first `num_computed` positions fill. Returns what is new.
    pub fn publish(
        &mut self,
        table: &mut BlockTable,
        token_ids: &[TokenId],
        num_computed: usize,
        namespace: Namespace,
    ) -> Vec<(BlockId, ContentId)> {
        let mut published = vec![];
        // Most steps fill no block.
        while (table.num_published + 1) * self.block_size <= num_computed {
            let start = table.num_published * self.block_size;
            let content = self.content(table.tip, namespace, &token_ids[start..start + self.block_size]);
            let id = table.ids[table.num_published];
            // Where another sequence was first, its block is the one to hit.
            let content_id = match self.cached.get(&content) {
                Some(&(_, content_id)) => content_id,
                None => {
                    self.num_contents += 1;
                    let content_id = ContentId(self.num_contents);
                    self.blocks[id.0 as usize].content = Some((content.clone(), content_id));
                    self.cached.insert(content, (id, content_id));
                    published.push((id, content_id));
                    content_id
                }
            };
            table.tip = Some(content_id);
            table.num_published += 1;
        }
        published
    }

    /// Nobody new can hit these any more, unless they hold something else by now. Who holds them keeps them.
    pub fn withdraw(&mut self, published: &[(BlockId, ContentId)]) {
        for &(id, content_id) in published {
            let block = &mut self.blocks[id.0 as usize];
            if let Some((content, _)) = block.content.take_if(|(_, found)| *found == content_id) {
                self.cached.remove(&content);
                block.is_withdrawn = true;
                if block.num_holders == 0 {
                    self.num_cached_free -= 1;
                    assert!(self.free.remove(&(block.released_at, id)));
                    block.released_at = 0;
                    self.free.insert((0, id));
                }
            }
        }
    }

    /// Gives up a sequence's hold. Its later blocks are evicted before its earlier ones, and what nobody can hit
    /// before everything else.
    pub fn release(&mut self, table: BlockTable) {
        for id in table.ids.into_iter().rev() {
            let block = &mut self.blocks[id.0 as usize];
            block.num_holders = block.num_holders.checked_sub(1).expect("a block is released once by each holder");
            if block.num_holders == 0 {
                self.num_releases += 1;
                block.released_at = if block.content.is_some() { self.num_releases } else { 0 };
                self.num_cached_free += usize::from(block.content.is_some());
                self.free.insert((block.released_at, id));
            }
        }
    }

    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.num_holders == 0 {
            assert!(self.free.remove(&(block.released_at, id)));
            self.num_cached_free -= 1;
        }
        block.num_holders += 1;
    }

    /// Panics unless every block is free or held exactly as often as `tables` say, and at most once where it can
    /// still be written.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut num_holders = vec![0; self.blocks.len()];
        for id in tables.flat_map(|table| &table.ids) {
            num_holders[id.0 as usize] += 1;
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let id = BlockId(i as u32);
            assert_eq!(block.num_holders, num_holders[i], "{id:?}");
            assert_eq!(block.num_holders == 0, self.free.contains(&(block.released_at, id)), "{id:?}");
            let is_full = block.content.is_some() || block.is_withdrawn;
            assert!(block.num_holders <= 1 || is_full, "{id:?} is shared and writable");
        }
        for (content, (id, content_id)) in &self.cached {
            assert_eq!(self.blocks[id.0 as usize].content, Some((content.clone(), *content_id)));
        }
        let num_cached = self.blocks.iter().filter(|b| b.num_holders == 0 && b.content.is_some()).count();
        assert_eq!(self.num_cached_free, num_cached);
    }
}
