use crate::Mutation;

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        family: "logprobs",
        file: "logprobs.cu",
        what: "NaN is overlooked",
        text: ": kBroken;",
        replacement: ": best;",
    },
    Mutation {
        family: "logprobs",
        file: "logprobs.cu",
        what: "rows in the order they lie in",
        text: "size_t(which) * p.vocabulary",
        replacement: "size_t(blockIdx.x % p.rows) * p.vocabulary",
    },
    Mutation {
        family: "logprobs",
        file: "logprobs.cu",
        what: "a token that does not exist is looked up",
        text: " && target < p.vocabulary",
        replacement: "",
    },
    Mutation {
        family: "logprobs",
        file: "logprobs.cu",
        what: "a row that does not exist is looked at",
        text: "which < p.rows && ",
        replacement: "",
    },
    Mutation {
        family: "logprobs",
        file: "logprobs.cu",
        what: "the sum is not relative to the best",
        text: "- double(of_best) - mass_log",
        replacement: "- mass_log",
    },
    Mutation {
        family: "logprobs",
        file: "logprobs.cu",
        what: "vectors overlap",
        text: "step = blockDim.x * count;",
        replacement: "step = blockDim.x;",
    },
    Mutation {
        family: "logprobs",
        file: "include/sampling.cuh",
        what: "a reduction begins before the last was read",
        text: "    __syncthreads();  // whoever still reads the last result\n",
        replacement: "",
    },
    Mutation {
        family: "logprobs",
        file: "include/sampling.cuh",
        what: "a reduction leaves the last warp out",
        text: "warp < blockDim.x / 32;",
        replacement: "warp + 1 < blockDim.x / 32;",
    },
    Mutation {
        family: "logprobs",
        file: "include/sampling.cuh",
        what: "the exponential has terms less",
        text: "1.0f / 5040, 1.0f / 720, 1.0f / 120,",
        replacement: "0.0f, 0.0f, 0.0f,",
    },
];
