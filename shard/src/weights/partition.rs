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

    /// This rank's key/value heads: an even part, or where there are fewer heads than ranks, the one that its query heads
    /// share with neighbouring ranks.
    pub fn kv_heads(self, heads: usize) -> Range<usize> {
        if heads >= self.world {
            return self.even(heads);
        }
        let head = self.rank * heads / self.world;
        head..head + 1
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(world: usize, part: impl Fn(Partition) -> Range<usize>) -> Vec<Range<usize>> {
        Partition { rank: 0, world }.ranks().map(part).collect()
    }

    #[test]
    fn even_parts_lie_side_by_side() {
        assert_eq!(parts(3, |rank| rank.even(6)), [0..2, 2..4, 4..6]);
        assert_eq!(parts(1, |rank| rank.even(5)), [0..5]);
    }

    #[test]
    fn ranks_share_key_value_heads_when_there_are_too_few() {
        assert_eq!(parts(2, |rank| rank.kv_heads(4)), [0..2, 2..4]);
        assert_eq!(parts(4, |rank| rank.kv_heads(2)), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(parts(2, |rank| rank.kv_heads(1)), [0..1, 0..1]);
    }

    #[test]
    fn a_vocabulary_of_any_size_is_covered_once() {
        assert_eq!(parts(4, |rank| rank.vocabulary(10)), [0..3, 3..6, 6..9, 9..10]);
        assert_eq!(parts(4, |rank| rank.vocabulary(5)), [0..2, 2..4, 4..5, 5..5]);
    }
}
