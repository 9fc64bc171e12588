use crate::Mutation;

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "no barrier before the inner rows are read",
        text: "    __syncthreads();\n",
        replacement: "",
    },
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "an inner element behind the last is read",
        text: "row < rows && at < rank ?",
        replacement: "row < rows && at <= rank ?",
    },
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "one output too many",
        text: "if (output >= int(p.outputs)) return;",
        replacement: "if (output > int(p.outputs)) return;",
    },
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "rows behind the last are written",
        text: "if (row < rows) *to",
        replacement: "*to",
    },
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "not scaled",
        text: "fmaf(p.scale, sums[row], to_float(*to))",
        replacement: "sums[row] + to_float(*to)",
    },
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "wrong stride of the weight",
        text: "size_t(output) * p.stride",
        replacement: "size_t(output) * p.rank",
    },
    Mutation {
        family: "lora",
        file: "lora.cu",
        what: "vectors of a rank that has none",
        text: "if (rank % kVector<T> == 0 && is_vec",
        replacement: "if (is_vec",
    },
];
