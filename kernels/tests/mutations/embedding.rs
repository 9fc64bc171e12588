use crate::Mutation;

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "an id behind the last row is read",
        text: "if (row < p.rows)",
        replacement: "if (row <= p.rows)",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "the first id is not row 0",
        text: "p.ids[blockIdx.x] - p.first;",
        replacement: "p.ids[blockIdx.x];",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "wrong stride of the table",
        text: "size_t(row) * p.stride + i];",
        replacement: "size_t(row) * p.width + i];",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "wrong stride of the result",
        text: "size_t(blockIdx.x) * p.width + i] = unit",
        replacement: "size_t(blockIdx.x) * p.stride + i] = unit",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "one unit too many",
        text: "if (i >= p.width) return;",
        replacement: "if (i > p.width) return;",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "blocks do the same piece",
        text: "blockIdx.y * blockDim.x + threadIdx.x;",
        replacement: "threadIdx.x;",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "addition: an id behind the last row is read",
        text: "if (row >= p.rows) return;",
        replacement: "if (row > p.rows) return;",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "addition: wrong stride of the table",
        text: "size_t(row) * p.stride;",
        replacement: "size_t(row) * p.width;",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "addition: a row is added twice",
        text: "i += gridDim.y * blockDim.x * count",
        replacement: "i += blockDim.x * count",
    },
    Mutation {
        family: "embedding",
        file: "embedding.cu",
        what: "addition: unaligned rows count as vectors",
        text: "is_vectorized<T>(p.table, p.stride) && ",
        replacement: "",
    },
];
