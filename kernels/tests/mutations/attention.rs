use crate::Mutation;

const FAMILY: &str = "attention";
const PLAIN: &str = "attention.cu";

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "the sequence behind is taken",
        text: "if (p.sequences[middle].first_row <= row) {",
        replacement: "if (p.sequences[middle].first_row < row) {",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "a row does not see itself",
        text: "const int count = min(position + 1 - base, kThreads), mine = threadIdx.x;",
        replacement: "const int count = min(max(position - base, 1), kThreads), mine = threadIdx.x;",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "no barrier behind the values",
        text: "        __syncthreads();  // the next keys overwrite slots, weights and partial sums\n",
        replacement: "",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "no barrier behind the queries",
        text: "sums[i] = 0.0f;\n    __syncthreads();\n",
        replacement: "sums[i] = 0.0f;\n",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "old sums are not scaled down",
        text: "float sum = sums[i] * keep;",
        replacement: "float sum = sums[i];",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "values at the distance of results",
        text: "* p.value_stride + i;",
        replacement: "* p.value_dim + i;",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "scores are capped before they are scaled",
        text: "            score *= p.scale;\n            if (p.soft_cap > 0.0f) score = p.soft_cap * tanhf(score / p.soft_cap);\n",
        replacement: "            if (p.soft_cap > 0.0f) score = p.soft_cap * tanhf(score / p.soft_cap);\n            score *= p.scale;\n",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "slopes count from the first key",
        text: "score += slope * float(base + mine - position);",
        replacement: "score += slope * float(base + mine);",
    },
    Mutation {
        family: FAMILY,
        file: PLAIN,
        what: "a sink takes no part in the sum",
        text: "total = p.sinks ? 1.0f : 0.0f;",
        replacement: "total = 0.0f;",
    },
    Mutation {
        family: FAMILY,
        file: "include/attention.cuh",
        what: "a window of one more",
        text: "max(position + 1 - int(p.window), 0)",
        replacement: "max(position - int(p.window), 0)",
    },
    Mutation {
        family: FAMILY,
        file: "include/attention.cuh",
        what: "the slot within a page is forgotten",
        text: " | (position & ((1u << p.page_shift) - 1));",
        replacement: ";",
    },
];
