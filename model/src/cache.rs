//! Which page holds what: a tree of token blocks over the pages of a key/value cache.
//!
//! Pure bookkeeping; the numbers lie in [`plumb_kernels::attention::KvPages`]. A block is [`PAGE`] tokens together with
//! everything before them, so a page can be shared by all sequences that begin with the same tokens. A page is either
//! private to one [`Table`], or published in the tree; published pages stay after their tables are gone until they
//! are the least recently used leaf and somebody needs room.

use std::collections::{BTreeSet, HashMap};

pub use plumb_kernels::attention::PAGE;

/// Pages, and the tree over the published ones.
#[derive(Debug)]
pub struct BlockCache {
    free: Vec<u32>,
    pages: usize,
    nodes: HashMap<NodeId, Node>,
    /// Children by parent and tokens.
    children: HashMap<(NodeId, Box<[u32]>), NodeId>,
    /// Nodes without users and children, least recently used first.
    evictable: BTreeSet<(u64, NodeId)>,
    next_node: NodeId,
    clock: u64,
    evictions: u64,
}

/// A block that is published.
pub type NodeId = u64;
/// The parent of first blocks.
const ROOT: NodeId = 0;

#[derive(Debug)]
struct Node {
    page: u32,
    parent: NodeId,
    tokens: Box<[u32]>,
    users: usize,
    children: usize,
    last_used: u64,
}

/// The pages of one sequence, from position 0.
#[derive(Debug, Default)]
pub struct Table {
    pages: Vec<u32>,
    /// Tree nodes of the leading pages; the pages after them are private.
    nodes: Vec<NodeId>,
    /// Positions whose keys and values were there when the table was made.
    cached: usize,
    /// False once the private pages cannot continue the tree, because another sequence has published the same block.
    publishes: bool,
}

impl Table {
    /// The pages.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Positions that need not be computed; a multiple of [`PAGE`].
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Whether it has one of these blocks.
    pub fn has_any(&self, blocks: &[NodeId]) -> bool {
        self.nodes.iter().any(|node| blocks.contains(node))
    }
}

impl BlockCache {
    /// A cache of `pages` free pages.
    pub fn new(pages: usize) -> Self {
        Self {
            free: (0..pages as u32).rev().collect(),
            pages,
            nodes: HashMap::new(),
            children: HashMap::new(),
            evictable: BTreeSet::new(),
            next_node: ROOT + 1,
            clock: 0,
            evictions: 0,
        }
    }

    /// Tokens for which there is room in all.
    pub fn capacity(&self) -> usize {
        self.pages * PAGE
    }

    /// Pages that hold nothing anybody uses or could reuse.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Published pages that were given up so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// How many of the first `reusable` tokens [`BlockCache::acquire`] would find published; a multiple of [`PAGE`].
    pub fn cached(&self, tokens: &[u32], reusable: usize) -> usize {
        self.published(tokens, reusable).len() * PAGE
    }

    /// Pages for a sequence that begins with `tokens` and may grow to `length`. Published pages of at most the first
    /// `reusable` tokens are shared. `None` if there is no room now.
    pub fn acquire(&mut self, tokens: &[u32], reusable: usize, length: usize) -> Option<Table> {
        let mut table = Table { publishes: true, ..Table::default() };
        for node in self.published(tokens, reusable) {
            self.use_node(node);
            table.nodes.push(node);
            table.pages.push(self.nodes[&node].page);
        }
        table.cached = table.pages.len() * PAGE;
        let missing = length.max(tokens.len()).div_ceil(PAGE) - table.pages.len();
        while self.free.len() < missing {
            if !self.evict() {
                self.release(table);
                return None;
            }
        }
        table.pages.extend(self.free.drain(self.free.len() - missing..));
        Some(table)
    }

    /// Makes the full pages of `tokens` known, so that later sequences can share them. The caller promises that they
    /// are computed before anybody reads them, or calls [`BlockCache::forget`].
    pub fn publish(&mut self, table: &mut Table, tokens: &[u32]) {
        for (i, block) in tokens.chunks_exact(PAGE).enumerate().skip(table.nodes.len()) {
            let parent = table.nodes.last().copied().unwrap_or(ROOT);
            let key = (parent, Box::from(block));
            if !table.publishes || self.children.contains_key(&key) {
                table.publishes = false;
                return;
            }
            let id = self.next_node;
            self.next_node += 1;
            let node = Node {
                page: table.pages[i],
                parent,
                tokens: Box::from(block),
                users: 1,
                children: 0,
                last_used: self.clock,
            };
            if let Some(parent) = self.nodes.get_mut(&parent) {
                parent.children += 1;
            }
            self.nodes.insert(id, node);
            self.children.insert(key, id);
            table.nodes.push(id);
        }
    }

    /// Gives a sequence's pages back; published ones stay until room is needed.
    pub fn release(&mut self, table: Table) {
        self.clock += 1;
        for id in table.nodes.iter().rev() {
            if let Some(node) = self.nodes.get_mut(id) {
                node.users -= 1;
                node.last_used = self.clock;
                if node.users == 0 && node.children == 0 {
                    self.evictable.insert((node.last_used, *id));
                }
            }
        }
        self.free.extend(&table.pages[table.nodes.len()..]);
    }

    /// Nobody finds any more what a sequence has published itself, because its numbers cannot be trusted. Whoever uses it
    /// already goes on with it. Answers the blocks.
    pub fn unpublish(&mut self, table: &Table) -> Vec<NodeId> {
        let own = &table.nodes[table.cached / PAGE..];
        own.iter().for_each(|id| self.hide(*id));
        own.to_vec()
    }

    /// Takes a block out of the look-up, if it is still the one that is found there.
    fn hide(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get(&id) else { return };
        let key = (node.parent, node.tokens.clone());
        if self.children.get(&key) == Some(&id) {
            self.children.remove(&key);
        }
    }

    /// Drops everything published: its numbers cannot be trusted. No table may be alive.
    pub fn forget(&mut self) {
        debug_assert!(self.nodes.values().all(|node| node.users == 0), "a table is alive");
        *self = Self { evictions: self.evictions, ..Self::new(self.pages) };
    }

    /// The published blocks that the tokens begin with.
    fn published(&self, tokens: &[u32], reusable: usize) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        for block in tokens[..reusable.min(tokens.len())].chunks_exact(PAGE) {
            let parent = nodes.last().copied().unwrap_or(ROOT);
            let Some(&node) = self.children.get(&(parent, Box::from(block))) else { break };
            nodes.push(node);
        }
        nodes
    }

    fn use_node(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            self.evictable.remove(&(node.last_used, id));
            node.users += 1;
        }
    }

    /// Frees the least recently used leaf.
    fn evict(&mut self) -> bool {
        let Some((_, id)) = self.evictable.pop_first() else { return false };
        self.hide(id);
        let Some(node) = self.nodes.remove(&id) else { return false };
        self.free.push(node.page);
        self.evictions += 1;
        if let Some(parent) = self.nodes.get_mut(&node.parent) {
            parent.children -= 1;
            if parent.children == 0 && parent.users == 0 {
                self.evictable.insert((parent.last_used, node.parent));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(seed: u32, blocks: usize) -> Vec<u32> {
        (0..blocks * PAGE).map(|i| seed * 1000 + i as u32).collect()
    }

    #[test]
    fn a_published_beginning_is_shared_by_whole_pages() {
        let mut cache = BlockCache::new(16);
        let text = tokens(1, 3);
        let mut first = cache.acquire(&text, 96, 100).unwrap();
        assert_eq!((first.cached(), first.pages().len()), (0, 4));
        cache.publish(&mut first, &text);
        let mut longer = text.clone();
        longer.extend([7, 8]);
        let second = cache.acquire(&longer, 98, 98).unwrap();
        assert_eq!(second.cached(), 96);
        assert_eq!(second.pages()[..3], first.pages()[..3]);
        assert_ne!(second.pages()[3], first.pages()[3]);
        // Only as much as may be reused.
        assert_eq!(cache.acquire(&longer, 95, 98).unwrap().cached(), 64);
        // Another beginning shares nothing, even with an equal block in the middle.
        let mut other = tokens(2, 1);
        other.extend(&text[32..]);
        assert_eq!(cache.acquire(&other, 96, 96).unwrap().cached(), 0);
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first() {
        let mut cache = BlockCache::new(4);
        for seed in [1, 2] {
            let mut table = cache.acquire(&tokens(seed, 2), 0, 64).unwrap();
            cache.publish(&mut table, &tokens(seed, 2));
            cache.release(table);
        }
        // Using 1 makes 2 the older one.
        let again = cache.acquire(&tokens(1, 2), 64, 64).unwrap();
        assert_eq!(again.cached(), 64);
        cache.release(again);
        let third = cache.acquire(&tokens(3, 1), 32, 32).unwrap();
        assert_eq!(cache.evictions(), 1);
        let second = cache.acquire(&tokens(2, 1), 32, 32).unwrap();
        assert_eq!(second.cached(), 32, "the leaf went, its parent stayed");
        cache.release(second);
        cache.release(third);
        let first = cache.acquire(&tokens(1, 2), 64, 64).unwrap();
        assert_eq!(first.cached(), 64);
    }

    #[test]
    fn what_is_in_use_is_never_taken() {
        let mut cache = BlockCache::new(3);
        let mut held = cache.acquire(&tokens(1, 2), 64, 64).unwrap();
        cache.publish(&mut held, &tokens(1, 2));
        assert!(cache.acquire(&tokens(2, 2), 64, 64).is_none());
        assert_eq!(cache.free_pages(), 1);
        cache.release(held);
        assert!(cache.acquire(&tokens(2, 2), 64, 64).is_some());
    }

    #[test]
    fn what_a_sequence_has_unpublished_is_not_found_and_comes_back() {
        let mut cache = BlockCache::new(6);
        let text = tokens(1, 3);
        let mut first = cache.acquire(&text[..32], 32, 32).unwrap();
        cache.publish(&mut first, &text[..32]);
        cache.release(first);
        // The first block is another's.
        let mut bad = cache.acquire(&text, 96, 96).unwrap();
        cache.publish(&mut bad, &text);
        assert_eq!(cache.unpublish(&bad).len(), 2);
        let mut good = cache.acquire(&text, 96, 96).unwrap();
        assert_eq!(good.cached(), 32);
        cache.publish(&mut good, &text);
        cache.release(good);
        cache.release(bad);
        assert_eq!(cache.acquire(&text, 96, 96).map(|table| (table.cached(), cache.release(table))), Some((96, ())));
        // Those that nobody finds go first, and do not take the others' place with them.
        let other = cache.acquire(&tokens(2, 3), 96, 96).unwrap();
        assert_eq!(cache.cached(&text, 96), 96);
        cache.release(other);
        assert!(cache.acquire(&[], 0, 6 * PAGE).is_some());
    }

    proptest! {
        #[test]
        fn pages_are_never_lost_nor_shared_by_accident(calls in proptest::collection::vec((0u32..4, 1usize..5, any::<bool>()), 1..60)) {
            let mut cache = BlockCache::new(12);
            let mut live: Vec<(Table, Vec<u32>)> = Vec::new();
            for (seed, blocks, release) in calls {
                if release && !live.is_empty() {
                    let (table, _) = live.remove(seed as usize % live.len());
                    if blocks == 1 {
                        cache.unpublish(&table);
                    }
                    cache.release(table);
                } else if let Some(mut table) = cache.acquire(&tokens(seed, blocks), blocks * PAGE, blocks * PAGE + 1) {
                    cache.publish(&mut table, &tokens(seed, blocks));
                    live.push((table, tokens(seed, blocks)));
                }
                // A page that two tables name stands for the same tokens from the beginning.
                for (i, (a, ta)) in live.iter().enumerate() {
                    for (b, tb) in &live[i + 1..] {
                        for (at, page) in a.pages().iter().enumerate() {
                            if let Some(other) = b.pages().iter().position(|p| p == page) {
                                prop_assert_eq!(at, other);
                                prop_assert_eq!(&ta[..(at + 1) * PAGE], &tb[..(at + 1) * PAGE]);
                            }
                        }
                    }
                }
            }
            for (table, _) in live {
                cache.release(table);
            }
            prop_assert!(cache.acquire(&[], 0, 12 * PAGE).is_some(), "all pages can be had again");
        }
    }
}
