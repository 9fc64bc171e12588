//! The cache against a model of it that is slow and obvious.

use proto::units::{BlockCount, BlockId, BlockSize, TokenCount, TokenId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{BlockCache, BlockLease};

const FOUR: BlockSize = BlockSize::new(4).unwrap();

fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

fn count(from: u32, to: u32) -> Vec<TokenId> {
    (from..to).map(TokenId).collect()
}

/// A lease that reaches `reach` tokens, and the tokens that were found.
fn lease(cache: &mut BlockCache, ids: &[TokenId], reach: u32) -> Option<(BlockLease, u32)> {
    let (mut lease, cached) = cache.lease(None, ids);
    if cache.extend(&mut lease, TokenCount(reach)) {
        return Some((lease, cached.0));
    }
    cache.release(lease);
    None
}

/// A request that computes `ids`, and nothing more, from its start to its end.
fn run(cache: &mut BlockCache, ids: &[TokenId]) -> u32 {
    let (mut lease, cached) = lease(cache, ids, ids.len() as u32).unwrap();
    cache.publish(&mut lease, ids, TokenCount(ids.len() as u32));
    cache.release(lease);
    cached
}

#[test]
fn block_zero_is_never_leased() {
    let mut cache = BlockCache::new(BlockCount(3), FOUR, true);
    let (lease, _) = lease(&mut cache, &count(0, 8), 8).unwrap();
    assert_eq!(lease.blocks(), [BlockId(1), BlockId(2)]);
    cache.release(lease);
    for blocks in [0, 1] {
        assert!(self::lease(&mut BlockCache::new(BlockCount(blocks), FOUR, true), &count(0, 1), 1).is_none());
    }
}

#[test]
fn a_lease_grows_as_a_whole_or_not_at_all() {
    let mut cache = BlockCache::new(BlockCount(4), FOUR, true);
    let (mut lease, _) = lease(&mut cache, &count(0, 5), 5).unwrap();
    assert!(!cache.extend(&mut lease, TokenCount(13)));
    assert_eq!(lease.count(), BlockCount(2));
    assert!(cache.extend(&mut lease, TokenCount(12)));
    assert_eq!((lease.count(), cache.available()), (BlockCount(3), BlockCount(0)));
    cache.release(lease);
    assert_eq!((cache.available(), cache.integrity()), (BlockCount(3), Ok(())));
}

#[test]
fn only_whole_blocks_are_found_and_never_the_last_token() {
    let mut cache = BlockCache::new(BlockCount(12), FOUR, true);
    assert_eq!(run(&mut cache, &count(0, 10)), 0);
    assert_eq!(run(&mut cache, &count(0, 10)), 8);
    assert_eq!(run(&mut cache, &count(0, 8)), 4, "the last token has to be computed");
    assert_eq!(run(&mut cache, &count(0, 9)), 8);
    assert_eq!(run(&mut cache, &tokens(&[0, 1, 2, 9, 4])), 0);
}

#[test]
fn what_was_not_computed_is_not_found() {
    let mut cache = BlockCache::new(BlockCount(12), FOUR, true);
    let ids = count(0, 20);
    let (mut first, _) = lease(&mut cache, &ids, 20).unwrap();
    cache.publish(&mut first, &ids, TokenCount(7));
    assert_eq!(cache.probe(None, &ids).0, TokenCount(4));
    cache.release(first);
    assert_eq!((cache.probe(None, &ids).0, cache.cached()), (TokenCount(4), BlockCount(1)));
}

#[test]
fn running_requests_share_what_one_of_them_has_computed() {
    let mut cache = BlockCache::new(BlockCount(5), FOUR, true);
    let ids = count(0, 9);
    let (mut first, _) = lease(&mut cache, &ids, 9).unwrap();
    cache.publish(&mut first, &ids, TokenCount(9));
    let (second, cached) = lease(&mut cache, &ids, 9).unwrap();
    assert_eq!((cached, &second.blocks()[..2]), (8, &first.blocks()[..2]));
    assert_eq!((cache.held(), second.own()), (BlockCount(4), BlockCount(1)));
    cache.release(first);
    assert_eq!(cache.available(), BlockCount(1), "blocks that somebody holds are not evicted");
    cache.release(second);
    assert_eq!(cache.available(), BlockCount(4));
}

#[test]
fn of_two_requests_that_compute_the_same_at_once_one_copy_stays() {
    let mut cache = BlockCache::new(BlockCount(10), FOUR, true);
    let ids = count(0, 9);
    let (mut first, _) = lease(&mut cache, &ids, 9).unwrap();
    let (mut second, cached) = lease(&mut cache, &ids, 9).unwrap();
    assert_eq!(cached, 0);
    cache.publish(&mut first, &ids, TokenCount(5));
    cache.publish(&mut second, &ids, TokenCount(9));
    cache.publish(&mut first, &ids, TokenCount(9));
    assert_eq!(cache.cached(), BlockCount(2));
    assert_eq!(cache.leased(), BlockCount(1 + 3), "the second goes on with its own copy");
    cache.release(first);
    cache.finish(second, &count(0, 12), TokenCount(12));
    assert_eq!((cache.cached(), cache.available()), (BlockCount(3), BlockCount(9)));
    cache.check_tree();
}

#[test]
fn adapters_have_their_own_prefixes() {
    let mut cache = BlockCache::new(BlockCount(10), FOUR, true);
    let ids = count(0, 9);
    run(&mut cache, &ids);
    assert_eq!(cache.probe(Some("poet"), &ids).0, TokenCount(0));
    let (mut lease, _) = cache.lease(Some("poet"), &ids);
    assert!(cache.extend(&mut lease, TokenCount(9)));
    cache.publish(&mut lease, &ids, TokenCount(9));
    cache.release(lease);
    assert_eq!((cache.probe(Some("poet"), &ids).0, cache.cached()), (TokenCount(8), BlockCount(4)));
}

#[test]
fn what_was_used_longest_ago_goes_first_and_from_its_end() {
    let mut cache = BlockCache::new(BlockCount(7), FOUR, true);
    let (old, young) = (count(0, 12), count(100, 112));
    run(&mut cache, &old);
    run(&mut cache, &young);
    assert_eq!(cache.cached(), BlockCount(6));
    run(&mut cache, &count(200, 204));
    assert_eq!(cache.probe(None, &count(0, 13)).0, TokenCount(8));
    assert_eq!(cache.probe(None, &count(100, 113)).0, TokenCount(12));
    // Used again, and the other one is the older.
    run(&mut cache, &count(0, 9));
    run(&mut cache, &count(300, 304));
    assert_eq!(cache.probe(None, &count(0, 13)).0, TokenCount(8));
    assert_eq!(cache.probe(None, &count(100, 113)).0, TokenCount(8));
}

#[test]
fn a_cache_that_shares_nothing_finds_nothing() {
    let mut cache = BlockCache::new(BlockCount(12), FOUR, false);
    let ids = count(0, 10);
    assert_eq!([run(&mut cache, &ids), run(&mut cache, &ids)], [0, 0]);
    assert_eq!(cache.cached(), BlockCount(0));
}

/// A list of everything that was published.
#[derive(Default)]
struct Naive {
    entries: Vec<Entry>,
    clock: u64,
    /// Tokens of a block.
    size: usize,
}

struct Entry {
    /// All tokens from the beginning on, in one of two namespaces.
    key: (usize, Vec<TokenId>),
    block: BlockId,
    holders: u32,
    used: u64,
}

/// A lease, and what the naive model knows of it.
struct Held {
    lease: BlockLease,
    key: (usize, Vec<TokenId>),
    reach: u32,
    computed: u32,
    /// Blocks of the path it holds.
    path: usize,
}

const NAMESPACES: [Option<&str>; 2] = [None, Some("poet")];

impl Naive {
    fn find(&mut self, namespace: usize, history: &[TokenId]) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.key.0 == namespace && entry.key.1 == history)
    }

    /// Blocks along `tokens` that are known, all but the last token.
    fn known(&mut self, key: &(usize, Vec<TokenId>), size: usize) -> Vec<BlockId> {
        let most = (key.1.len() - 1) / size;
        (1..=most).map_while(|end| self.find(key.0, &key.1[..end * size]).map(|entry| entry.block)).collect()
    }

    fn hold(&mut self, key: &(usize, Vec<TokenId>), path: usize, size: usize) {
        for end in 1..=path {
            self.find(key.0, &key.1[..end * size]).unwrap().holders += 1;
        }
    }

    /// Publishes up to `whole` blocks behind a path, and returns its new length; `all` of them, or up to the first that is
    /// known already.
    fn publish(
        &mut self,
        key: &(usize, Vec<TokenId>),
        blocks: &[BlockId],
        mut path: usize,
        whole: u32,
        all: bool,
    ) -> usize {
        let used = self.clock;
        while path < whole as usize {
            let history = &key.1[..(path + 1) * self.size];
            match self.find(key.0, history) {
                Some(_) if !all => break,
                Some(entry) => entry.holders += 1,
                None => {
                    let key = (key.0, history.to_vec());
                    self.entries.push(Entry { key, block: blocks[path], holders: 1, used });
                }
            }
            path += 1;
        }
        path
    }

    fn release(&mut self, key: &(usize, Vec<TokenId>), path: usize, size: usize) {
        self.clock += 1;
        let clock = self.clock;
        for end in 1..=path {
            let entry = self.find(key.0, &key.1[..end * size]).unwrap();
            entry.holders -= 1;
            entry.used = clock;
        }
    }

    fn evict(&mut self) -> Option<BlockId> {
        let is_leaf = |entry: &Entry| {
            let below = |other: &Entry| {
                other.key.0 == entry.key.0
                    && other.key.1.len() > entry.key.1.len()
                    && other.key.1.starts_with(&entry.key.1)
            };
            entry.holders == 0 && !self.entries.iter().any(below)
        };
        let index = (0..self.entries.len())
            .filter(|index| is_leaf(&self.entries[*index]))
            .min_by_key(|index| self.entries[*index].used)?;
        Some(self.entries.swap_remove(index).block)
    }
}

/// Random operations on both, and every answer compared.
fn compare(seed: u64, operations: usize, block_size: u32, blocks: u32) {
    let size = BlockSize::new(block_size).unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    let mut cache = BlockCache::new(BlockCount(blocks), size, true);
    let (mut naive, mut held) = (Naive { size: block_size as usize, ..Naive::default() }, Vec::<Held>::new());
    // Blocks that are neither published nor leased.
    let mut free = blocks - 1;
    for operation in 0..operations {
        match random.random_range(0..10) {
            0..3 => {
                let length = random.random_range(1..=7 * block_size as usize);
                let ids = (0..length).map(|_| TokenId(random.random_range(0..2))).collect();
                let key = (random.random_range(0..2), ids);
                let known = naive.known(&key, block_size as usize);
                let (lease, cached) = cache.lease(NAMESPACES[key.0], &key.1);
                assert_eq!((lease.blocks(), cached.0), (&known[..], known.len() as u32 * block_size));
                naive.hold(&key, known.len(), block_size as usize);
                let path = known.len();
                held.push(Held { lease, key, reach: cached.0, computed: cached.0, path });
            }
            3..6 if !held.is_empty() => {
                let index = random.random_range(0..held.len());
                let Held { lease, key, reach, .. } = &mut held[index];
                let wanted = (*reach + random.random_range(0..3 * block_size)).min(key.1.len() as u32);
                let missing = wanted.div_ceil(block_size).saturating_sub(lease.count().0);
                let idle = naive.entries.iter().filter(|entry| entry.holders == 0).count() as u32;
                let fits = missing <= free + idle;
                assert_eq!(cache.extend(lease, TokenCount(wanted)), fits);
                if fits {
                    *reach = wanted;
                    for _ in 0..missing.saturating_sub(free) {
                        naive.evict().expect("as many are idle");
                        free += 1;
                    }
                    free -= missing;
                }
            }
            6..8 if !held.is_empty() => {
                let index = random.random_range(0..held.len());
                let Held { lease, key, reach, computed, path } = &mut held[index];
                *computed = random.random_range(*computed..=*reach);
                cache.publish(lease, &key.1, TokenCount(*computed));
                *path = naive.publish(key, lease.blocks(), *path, *computed / block_size, false);
            }
            8.. if !held.is_empty() => {
                let index = random.random_range(0..held.len());
                let Held { lease, key, mut path, computed, .. } = held.swap_remove(index);
                let finishes = random.random_bool(0.5);
                if finishes {
                    path = naive.publish(&key, lease.blocks(), path, computed / block_size, true);
                }
                let published = |block: &&BlockId| naive.entries.iter().any(|entry| entry.block == **block);
                free += lease.count().0 - lease.blocks().iter().filter(published).count() as u32;
                naive.release(&key, path, block_size as usize);
                match finishes {
                    true => cache.finish(lease, &key.1, TokenCount(computed)),
                    false => cache.release(lease),
                }
            }
            _ => {}
        }
        let idle = naive.entries.iter().filter(|entry| entry.holders == 0).count() as u32;
        assert_eq!(cache.available(), BlockCount(free + idle), "seed {seed}, operation {operation}");
        assert_eq!(cache.cached(), BlockCount(naive.entries.len() as u32));
        assert_eq!(cache.integrity(), Ok(()));
        if operation % 64 == 0 {
            cache.check_tree();
        }
    }
    held.into_iter().for_each(|held| cache.release(held.lease));
    assert_eq!(cache.available(), cache.total());
}

#[test]
fn a_million_random_operations_give_what_a_naive_model_gives() {
    for seed in 0..10 {
        compare(seed, 100_000, 1 + seed as u32 % 3, 8 + 6 * (seed as u32 % 4));
    }
}
