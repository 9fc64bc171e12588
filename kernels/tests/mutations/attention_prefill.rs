use crate::Mutation;

const FAMILY: &str = "attention_prefill";
const PREFILL: &str = "attention_prefill.cu";
const LATENT: &str = "attention_latent.cu";
const BLOCK: &str = "include/attention_block.cuh";
const FRAGMENTS: &str = "include/fragments.cuh";

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "keys are not waited for",
        text: "            ptx::wait_group<0>();\n            __syncthreads();  // the keys",
        replacement: "            __syncthreads();  // the keys",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "values are not waited for",
        text: "            ptx::wait_group<0>();\n            __syncthreads();  // the values",
        replacement: "            __syncthreads();  // the values",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "no barrier behind the keys",
        text: "            __syncthreads();  // the keys are there for all warps, and nobody reads the values before them any more\n",
        replacement: "",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "no barrier behind the values",
        text: "            __syncthreads();  // the values are there for all warps, and nobody reads the keys any more\n",
        replacement: "",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "the same keys again",
        text: "locate_keys(slots, key + kKeys);",
        replacement: "locate_keys(slots, key);",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "values are those of the keys",
        text: "copy(values(), p.values, slots);",
        replacement: "copy(values(), p.keys, slots);",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "old sums are not scaled down",
        text: "if (!__all_sync(kAllLanes, same)) {",
        replacement: "if (keep[0][0] > 1.0f) {",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "one tile of keys too few",
        text: "(block.end + kKeys - 1) / kKeys",
        replacement: "(block.end + kKeys - 2) / kKeys",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "no mask",
        text: "if (masked) mask(",
        replacement: "if (masked && factor < 0.0f) mask(",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "weights of the same keys twice",
        text: "scores[m][2 * n], scores[m][2 * n + 1]",
        replacement: "scores[m][2 * n], scores[m][2 * n]",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "rows behind the last are read",
        text: "query[half] = of < block.rows ?",
        replacement: "query[half] = of >= 0 ?",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "rows behind the last are written",
        text: "                if (of >= block.rows) continue;\n",
        replacement: "",
    },
    Mutation {
        family: FAMILY,
        file: PREFILL,
        what: "the second half of the keys is the first",
        text: "copy_rows<32, kThreads>(p, block, to, 32, cache, slots[1], threadIdx.x);",
        replacement: "copy_rows<32, kThreads>(p, block, to, 32, cache, slots[0], threadIdx.x);",
    },
    Mutation {
        family: FAMILY,
        file: BLOCK,
        what: "tiles are cut from the end of their sequence",
        text: "left -= __shfl_sync(kAllLanes, up_to, owner) - tiles;",
        replacement: "left -= __shfl_sync(kAllLanes, up_to, owner) - tiles - 1;",
    },
    Mutation {
        family: FAMILY,
        file: BLOCK,
        what: "sequences behind a warp's are those of the first",
        text: "index = p.work[base + owner];",
        replacement: "index = p.work[owner];",
    },
    Mutation {
        family: FAMILY,
        file: BLOCK,
        what: "the future is seen within a tile",
        text: "none_beyond = position(0) + 1;",
        replacement: "none_beyond = last_visible + 1;",
    },
    Mutation {
        family: FAMILY,
        file: BLOCK,
        what: "the window is that of the first row",
        text: "all_visible = ::first_visible(p, last_visible);",
        replacement: "all_visible = first_visible;",
    },
    Mutation {
        family: FAMILY,
        file: BLOCK,
        what: "heads are those of another token",
        text: "kv_head * group + uint32_t(first_row + row) % group;",
        replacement: "kv_head * group + uint32_t(row) % group;",
    },
    Mutation {
        family: FAMILY,
        file: BLOCK,
        what: "copies go to the rows before",
        text: "void* chunk = is_power ? lane.of({to.base + row * row_bytes}, first,",
        replacement: "void* chunk = is_power ? lane.of({to.base + row * row_bytes}, 0,",
    },
    Mutation {
        family: FAMILY,
        file: FRAGMENTS,
        what: "keys in the order of values",
        text: "return {lane / 16 * 8 + lane % 8, lane / 8 % 2};",
        replacement: "return {lane % 16, lane / 16};",
    },
    Mutation {
        family: FAMILY,
        file: FRAGMENTS,
        what: "chunks are not permuted",
        text: "return row / (8 / kPeriod) & (kPeriod - 1);",
        replacement: "return 0 * row;",
    },
    Mutation {
        family: FAMILY,
        file: LATENT,
        what: "rows of a tile are those of the first",
        text: "const int row = row_tile * 16 + lane / 4 + 8 * half;",
        replacement: "const int row = lane / 4 + 8 * half;",
    },
];
