//! Which blocks hold the keys and values of which tokens: a radix tree whose digits are whole blocks of tokens.
//!
//! A node is a block of the cache and the tokens in it; the path from a root to it is the whole history that its keys and
//! values were computed from. Roots are namespaces: equal tokens have equal keys only under the same weights, so each
//! adapter has a root of its own. Nodes are compared by their tokens, not by a hash of them.
//!
//! Rows hold paths. A held node has held ancestors only, so that what nobody holds can always be evicted from its leaves
//! up; the leaf that was used longest ago goes first.

use std::collections::{BTreeSet, HashMap};

use proto::units::{BlockCount, BlockId, BlockSize, TokenId};

/// A node, or a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NodeId(u32);

/// The weights that computed the keys and values: `None` is the base model.
pub(super) type Namespace = Option<Box<str>>;

#[derive(Debug)]
struct Node {
    place: Place,
    children: HashMap<Box<[TokenId]>, NodeId>,
    /// Rows whose path goes through here.
    holders: u32,
    /// When it was part of a path last.
    used: u64,
}

/// Where a node hangs.
#[derive(Debug)]
enum Place {
    Root(Namespace),
    Inner { parent: NodeId, tokens: Box<[TokenId]>, block: BlockId },
}

/// The tree. Every block in it belongs to exactly one node.
#[derive(Debug)]
pub(super) struct PrefixTree {
    /// By their ids; `None` is to be used again.
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    roots: HashMap<Namespace, NodeId>,
    /// Blocks in the tree.
    blocks: BlockCount,
    /// Those that no row holds.
    idle: BlockCount,
    /// Nodes that can be evicted now, the one used longest ago first.
    leaves: BTreeSet<(u64, NodeId)>,
    clock: u64,
    block_size: BlockSize,
}

impl PrefixTree {
    pub(super) fn new(block_size: BlockSize) -> Self {
        Self {
            nodes: Vec::new(),
            vacant: Vec::new(),
            roots: HashMap::new(),
            blocks: BlockCount(0),
            idle: BlockCount(0),
            leaves: BTreeSet::new(),
            clock: 0,
            block_size,
        }
    }

    /// Blocks in the tree.
    pub(super) fn blocks(&self) -> BlockCount {
        self.blocks
    }

    /// Blocks that can be evicted, one after the other.
    pub(super) fn idle(&self) -> BlockCount {
        self.idle
    }

    /// How many leading blocks of `tokens` are there, and how many of these nobody holds.
    pub(super) fn probe(&self, namespace: Option<&str>, tokens: &[TokenId]) -> (BlockCount, BlockCount) {
        let Some(root) = self.roots.get(&namespace.map(Box::from)) else { return Default::default() };
        let (mut found, mut idle, mut at) = (0, 0, *root);
        for run in tokens.chunks_exact(self.run_length()) {
            let Some(child) = self.child(at, run) else { break };
            at = child;
            found += 1;
            idle += u32::from(self.node(at).holders == 0);
        }
        (BlockCount(found), BlockCount(idle))
    }

    /// Takes hold of the longest path along `tokens`: its last node, and the blocks on it.
    pub(super) fn hold(&mut self, namespace: Option<&str>, tokens: &[TokenId]) -> (NodeId, Vec<BlockId>) {
        self.clock += 1;
        let mut at = self.root(namespace);
        self.node_mut(at).holders += 1;
        let mut blocks = Vec::new();
        for run in tokens.chunks_exact(self.run_length()) {
            let Some(child) = self.child(at, run) else { break };
            at = child;
            self.add_holder(at);
            blocks.extend(self.block(at));
        }
        (at, blocks)
    }

    /// Whether these tokens follow a path that ends at `tip`.
    pub(super) fn has(&self, tip: NodeId, tokens: &[TokenId]) -> bool {
        self.child(tip, tokens).is_some()
    }

    /// Goes one block deeper with a path that ends at `tip`: `tokens` lie in `block`. The new end of the path, and whether
    /// the tree has taken the block; it has not if it had one for these tokens already.
    pub(super) fn grow(&mut self, tip: NodeId, tokens: &[TokenId], block: BlockId) -> (NodeId, bool) {
        debug_assert_eq!(tokens.len(), self.run_length(), "only whole blocks are published");
        if let Some(child) = self.child(tip, tokens) {
            self.add_holder(child);
            return (child, false);
        }
        let place = Place::Inner { parent: tip, tokens: tokens.into(), block };
        let child = self.insert(Node { place, children: HashMap::new(), holders: 1, used: self.clock });
        self.node_mut(tip).children.insert(tokens.into(), child);
        self.blocks.0 += 1;
        (child, true)
    }

    /// Lets go of a path.
    pub(super) fn release(&mut self, tip: NodeId) {
        self.clock += 1;
        let mut at = tip;
        loop {
            let clock = self.clock;
            let node = self.node_mut(at);
            node.holders -= 1;
            node.used = clock;
            let is_idle = node.holders == 0;
            match node.place {
                Place::Root(_) => return self.prune(at),
                Place::Inner { parent, .. } => {
                    if is_idle {
                        self.idle.0 += 1;
                        self.note_leaf(at);
                    }
                    at = parent;
                }
            }
        }
    }

    /// Takes the block out that was used longest ago, if there is one that nobody holds.
    pub(super) fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.leaves.pop_first()?;
        let node = self.nodes[id.0 as usize].take().expect("leaves are in the tree");
        self.vacant.push(id);
        let Place::Inner { parent, tokens, block } = node.place else { unreachable!("roots are no leaves") };
        self.node_mut(parent).children.remove(&tokens);
        self.blocks.0 -= 1;
        self.idle.0 -= 1;
        match self.node(parent).place {
            Place::Root(_) => self.prune(parent),
            Place::Inner { .. } => self.note_leaf(parent),
        }
        Some(block)
    }

    /// Checks what is kept up to date against what is there.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let inner = |node: &&Node| matches!(node.place, Place::Inner { .. });
        let count = |nodes: &mut dyn Iterator<Item = &Node>| BlockCount(nodes.count() as u32);
        let all = || self.nodes.iter().flatten().filter(inner);
        assert_eq!(count(&mut all()), self.blocks, "blocks of the tree");
        assert_eq!(count(&mut all().filter(|node| node.holders == 0)), self.idle, "idle blocks");
        let leaves = all().filter(|node| node.holders == 0 && node.children.is_empty()).count();
        assert_eq!(leaves, self.leaves.len(), "leaves that can be evicted");
        for node in all() {
            let Place::Inner { parent, .. } = node.place else { continue };
            assert!(self.node(parent).holders >= node.holders, "who holds a node holds its ancestors");
        }
    }

    fn run_length(&self) -> usize {
        self.block_size.get() as usize
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0 as usize].as_ref().expect("ids are those of nodes")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0 as usize].as_mut().expect("ids are those of nodes")
    }

    fn block(&self, id: NodeId) -> Option<BlockId> {
        match self.node(id).place {
            Place::Root(_) => None,
            Place::Inner { block, .. } => Some(block),
        }
    }

    fn child(&self, id: NodeId, tokens: &[TokenId]) -> Option<NodeId> {
        self.node(id).children.get(tokens).copied()
    }

    fn root(&mut self, namespace: Option<&str>) -> NodeId {
        let namespace: Namespace = namespace.map(Box::from);
        if let Some(root) = self.roots.get(&namespace) {
            return *root;
        }
        let place = Place::Root(namespace.clone());
        let root = self.insert(Node { place, children: HashMap::new(), holders: 0, used: 0 });
        self.roots.insert(namespace, root);
        root
    }

    fn insert(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.vacant.pop() {
            self.nodes[id.0 as usize] = Some(node);
            return id;
        }
        self.nodes.push(Some(node));
        NodeId(self.nodes.len() as u32 - 1)
    }

    fn add_holder(&mut self, id: NodeId) {
        let node = self.node_mut(id);
        node.holders += 1;
        if node.holders == 1 {
            let used = node.used;
            self.idle.0 -= 1;
            self.leaves.remove(&(used, id));
        }
    }

    /// A node that nobody holds and that nothing hangs on can be evicted.
    fn note_leaf(&mut self, id: NodeId) {
        let node = self.node(id);
        if node.holders == 0 && node.children.is_empty() {
            self.leaves.insert((node.used, id));
        }
    }

    /// A root that nobody needs goes: adapters come and go.
    fn prune(&mut self, id: NodeId) {
        let node = self.node(id);
        if node.holders > 0 || !node.children.is_empty() {
            return;
        }
        if let Some(Node { place: Place::Root(namespace), .. }) = self.nodes[id.0 as usize].take() {
            self.roots.remove(&namespace);
            self.vacant.push(id);
        }
    }
}
