use std::ops::Range;

/// One rank among the shards that hold a model together (tensor parallelism; Shoeybi et al. 2019, section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// This one, from 0.
    pub rank: usize,
    /// All of them; at least 1.
    pub world: usize,
}

impl Partition {
    /// One rank that holds everything.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// Whether there are other ranks.
    pub fn is_split(self) -> bool {
        self.world > 1
    }

    /// This rank's part of `units` that divide evenly. That they do is checked before anything is loaded.
    pub fn even(self, units: usize) -> Range<usize> {
        debug_assert!(units.is_multiple_of(self.world), "{units} units over {} ranks", self.world);
        let part = units / self.world;
        self.rank * part..(self.rank + 1) * part
    }

    /// The key/value head of each of this rank's groups of query heads, of which there are `heads` in all. Query heads that
    /// share a key/value head make a group, or where ranks cut through them, equal parts of one: then a key/value head occurs
    /// on several ranks, or several times.
    pub fn kv_heads(self, heads: usize, kv_heads: usize) -> Vec<usize> {
        let own = self.even(heads);
        let sharing = heads / kv_heads;
        let group = gcd(sharing, own.len());
        own.step_by(group).map(|head| head / sharing).collect()
    }

    /// This rank's block of a vocabulary of any size: all blocks are equally long, but for the last, which may be shorter.
    pub fn vocabulary(self, entries: usize) -> Range<usize> {
        let block = entries.div_ceil(self.world);
        (self.rank * block).min(entries)..((self.rank + 1) * block).min(entries)
    }

    /// All ranks, in order.
    pub fn ranks(self) -> impl Iterator<Item = Self> {
        (0..self.world).map(move |rank| Self { rank, ..self })
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts<T>(world: usize, part: impl Fn(Partition) -> T) -> Vec<T> {
        Partition { rank: 0, world }.ranks().map(part).collect()
    }

    #[test]
    fn even_parts_lie_side_by_side() {
        assert_eq!(parts(3, |rank| rank.even(6)), [0..2, 2..4, 4..6]);
        assert_eq!(parts(1, |rank| rank.even(5)), vec![0..5]);
    }

    #[test]
    fn ranks_share_key_value_heads_where_they_cut_through_groups() {
        let check = |heads, kv_heads, world, expected: &[&[usize]]| {
            assert_eq!(parts(world, |rank| rank.kv_heads(heads, kv_heads)), expected);
        };
        check(8, 4, 2, &[&[0, 1], &[2, 3]]);
        check(8, 2, 4, &[&[0], &[0], &[1], &[1]]);
        check(8, 1, 2, &[&[0], &[0]]);
        check(6, 3, 2, &[&[0, 0, 1], &[1, 2, 2]]);
        check(6, 3, 1, &[&[0, 1, 2]]);
    }

    #[test]
    fn a_vocabulary_of_any_size_is_covered_once() {
        assert_eq!(parts(4, |rank| rank.vocabulary(10)), [0..3, 3..6, 6..9, 9..10]);
        assert_eq!(parts(4, |rank| rank.vocabulary(5)), [0..2, 2..4, 4..5, 5..5]);
    }
}
