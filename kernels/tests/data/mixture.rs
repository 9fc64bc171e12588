use kernels::{DType, Expert, Projection, Routes};

use super::{Random, Weight};

/// The experts of a layer, owned.
pub(crate) struct Mixture {
    /// Gate, up and down of each expert, with biases.
    projections: Vec<[(Weight, Vec<f32>); 3]>,
    pub(crate) width: usize,
    biased: bool,
}

impl Mixture {
    pub(crate) fn new(dtype: DType, count: usize, width: usize, inner: usize, biased: bool) -> Self {
        let mut random = Random::new((count * 7 + width * 3 + inner) as u64);
        let mut projection =
            |rows, cols| (Weight::random(&mut random, dtype, rows, cols), random.numbers(rows));
        let projections = (0..count)
            .map(|_| [projection(inner, width), projection(inner, width), projection(width, inner)])
            .collect();
        Self { projections, width, biased }
    }

    pub(crate) fn experts<'a>(&'a self) -> Vec<Expert<'a>> {
        let of = |[gate, up, down]: &'a [(Weight, Vec<f32>); 3]| Expert {
            gate: self.projection(gate),
            up: self.projection(up),
            down: self.projection(down),
        };
        self.projections.iter().map(of).collect()
    }

    fn projection<'a>(&self, (weight, bias): &'a (Weight, Vec<f32>)) -> Projection<'a> {
        Projection { weight: weight.matrix(), bias: self.biased.then_some(&bias[..]) }
    }

    /// Different experts for each token, with random weights.
    pub(crate) fn routes(&self, random: &mut Random, tokens: usize, per_token: usize) -> Routes {
        let mut routes = Routes::default();
        for _ in 0..tokens {
            routes.experts.extend(&random.permutation(self.projections.len())[..per_token]);
            routes.weights.extend(random.numbers(per_token));
        }
        routes
    }
}
