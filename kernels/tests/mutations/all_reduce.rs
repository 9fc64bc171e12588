use crate::Mutation;

const FAMILY: &str = "all_reduce";
const FILE: &str = "all_reduce.cu";

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "nobody waits for the others",
        text: "int32_t(ptx::load_acquire_system(flag) - step) < 0",
        replacement: "false",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "the others' sums are not waited for",
        text: "        meet(group, 2 * round + 2);\n",
        replacement: "",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "the word is given before the numbers are there",
        text: "    __syncthreads();\n    const uint32_t other",
        replacement: "    const uint32_t other",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "some read before the others' word has come",
        text: "    }\n    __syncthreads();\n}",
        replacement: "    }\n}",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "both slots are one",
        text: "size_t(round & 1) * group.slot_bytes",
        replacement: "0",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "one rank is left out of a sum",
        text: "        if (rank < int(group.world)) {\n",
        replacement: "        if (rank + 1 < int(group.world)) {\n",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "nobody sums what is left over",
        text: "(vectors + group.world - 1) / group.world",
        replacement: "vectors / group.world",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "whole vectors are written at the end",
        text: "        if (at + i < len) run[at + i] = pack.at[i];",
        replacement: "        run[at + i] = pack.at[i];",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "columns do not end",
        text: "if (++col == cols) ++row, col = 0;",
        replacement: "++col;",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "every piece is the first",
        text: "static_cast<const T*>(p.own) + p.first;",
        replacement: "static_cast<const T*>(p.own);",
    },
    Mutation {
        family: FAMILY,
        file: FILE,
        what: "blocks take each other's vectors",
        text: "step = gridDim.x * blockDim.x;",
        replacement: "step = blockDim.x;",
    },
];
