// Of a causal batch's attention by flashinfer's fa2 kernel on some SMs: into how many CTAs its keys are best
// split, and how long that takes. A CTA computes a tile of queries of one KV head over a chunk of their keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace semipd {

struct Split {
    double us;          // an estimate, of a layer
    std::int64_t ctas;  // for each KV head; 0 when no keys are split
};

// Measured on an H200 with bf16 and a head dimension of 128 (docs/results/split-kv.md): microseconds of a key
// of a tile, and to merge partial results, with each query head's row of them on one SM.
constexpr double MERGE_US = 8.0, MERGE_ROW_US = 0.1;
inline double key_us(std::int64_t rows) { return rows == 16 ? 0.02 : rows == 64 ? 0.032 : 0.046; }
constexpr int CTAS_OF_SM = 2;
// Share of a chunk that SMs wait for others in the end, at most, when there are many chunks.
constexpr double LAST_WAVE = 0.5;
// Of the time that some SMs take longer than others, for a CTA is faster when few run beside it.
constexpr double ALONE = 0.75;
constexpr std::int64_t CHUNK_SIZES = 48, LEAST_CHUNK = 128;

class Waves {
  public:
    Waves(std::int64_t query_heads, std::int64_t kv_heads, std::int64_t head_dim,
          std::int64_t workspace_bytes)
        : query_heads(query_heads), kv_heads(kv_heads), head_dim(head_dim), workspace_bytes(workspace_bytes) {
        if (kv_heads < 1 || query_heads < kv_heads || head_dim < 1 || workspace_bytes < 0)
            throw std::invalid_argument("impossible heads, or no workspace");
    }

    // Of a tile, which has one row for each token and each query head of its KV head.
    std::int64_t tile_rows(const std::vector<std::int64_t>& new_tokens) const {
        if (new_tokens.empty()) throw std::invalid_argument("expected prompts");
        std::int64_t tokens = 0;
        for (const auto each : new_tokens) tokens += each;
        const auto rows = tokens * group() / static_cast<std::int64_t>(new_tokens.size());
        return rows > 64 && head_dim < 256 ? 128 : rows > 16 ? 64 : 16;
    }

    // The longest prompt's keys in one chunk, in two, and so on: waves of CTAs on these SMs, or even shares
    // and a part of a chunk (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969, has a whole
    // one), and merging.
    Split best(const std::vector<std::int64_t>& new_tokens, const std::vector<std::int64_t>& kv_lens,
               std::int64_t sms) const {
        const auto n = new_tokens.size();
        if (n == 0 || kv_lens.size() != n || sms < 1)
            throw std::invalid_argument("expected prompts, and SMs");
        const auto rows = tile_rows(new_tokens);
        std::vector<std::int64_t> tiles(n);
        double keys = 0;
        std::int64_t longest = 0;
        for (std::size_t i = 0; i < n; ++i) {
            tiles[i] = (new_tokens[i] * group() + rows - 1) / rows;
            const auto cached = kv_lens[i] - new_tokens[i];
            for (std::int64_t tile = 1; tile <= tiles[i]; ++tile) {
                const auto seen = std::min(cached + (tile * rows + group() - 1) / group(), kv_lens[i]);
                keys += static_cast<double>(seen);
                longest = std::max(longest, seen);
            }
        }
        const double slots = static_cast<double>(CTAS_OF_SM * sms) / static_cast<double>(kv_heads);
        const double even = keys / slots;
        const auto room = workspace_bytes / partial_bytes(rows);
        Split best{0.0, 0};
        const auto most = std::max<std::int64_t>(1, std::min(CHUNK_SIZES, longest / LEAST_CHUNK));
        for (std::int64_t parts = 1; parts <= most; ++parts) {
            const auto chunk = (longest + parts - 1) / parts;
            std::int64_t ctas = 0, partial_rows = 0;
            for (std::size_t i = 0; i < n; ++i) {
                const auto pieces = parts == 1 ? 1 : (kv_lens[i] + chunk - 1) / chunk;
                ctas += tiles[i] * pieces;
                partial_rows += new_tokens[i] * pieces;
            }
            const auto size = static_cast<double>(chunk);
            const double waves = std::ceil(static_cast<double>(ctas) / slots) * size;
            const double busy = std::max(size, std::min(waves, even + LAST_WAVE * size));
            double us = key_us(rows) * (even + ALONE * (busy - even));
            if (parts > 1) {
                if (ctas > room) continue;
                us += MERGE_US + MERGE_ROW_US * static_cast<double>(partial_rows * query_heads) /
                                     static_cast<double>(sms);
            }
            if (parts == 1 || us < best.us) best = {us, parts == 1 ? 0 : ctas};
        }
        return best;
    }

    // What flashinfer's planner sets aside for the results of as many CTAs as there are KV heads: float32,
    // and a sum.
    std::int64_t partial_bytes(std::int64_t rows) const { return 4 * query_heads * rows * (head_dim + 1); }

    std::int64_t query_heads, kv_heads, head_dim, workspace_bytes;

  private:
    std::int64_t group() const { return query_heads / kv_heads; }
};

}  // namespace semipd
