// What steps cost and when they end: the arithmetic of simulated runs, where a replay spends its time. No
// Python in here. Sums are taken in one order and compiled without contraction, so results are equal to the
// last bit everywhere.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace semipd {

// The measured values of one variable of a grid, ascending, and how to place a number among them. Beyond
// `low` and `high` is outside the grid, and clamped to the first or last value. With `log`, weights are
// linear in the logarithm of the number and an `offset`.
class Axis {
  public:
    struct Place {
        std::size_t first;              // index of the first neighbour
        std::array<double, 2> weights;  // of the neighbours
        std::size_t neighbours;         // 2, or 1 on an axis of a single value
        bool outside;
    };

    Axis(std::vector<double> values, double low, double high, bool log, double offset)
        : low(low), high(high), log(log), offset(offset), values(std::move(values)), knots_(this->values) {
        if (this->values.empty()) throw std::invalid_argument("an axis without values");
        std::transform(knots_.begin(), knots_.end(), knots_.begin(), [this](double x) { return along(x); });
    }

    Place place(double x) const {
        const std::size_t last = values.size() - 1;
        const bool outside = x < low || x > high;
        if (last == 0) return {0, {1.0, 0.0}, 1, outside};
        if (x <= values.front()) return {0, {1.0, 0.0}, 2, outside};
        if (x >= values.back()) return {last - 1, {0.0, 1.0}, 2, outside};
        const std::size_t i = std::upper_bound(values.begin(), values.end(), x) - values.begin() - 1;
        const double weight = (along(x) - knots_[i]) / (knots_[i + 1] - knots_[i]);
        return {i, {1 - weight, weight}, 2, outside};
    }

    double low;
    double high;
    bool log;
    double offset;
    std::vector<double> values;

  private:
    double along(double x) const { return log ? std::log2(x + offset) : x; }

    std::vector<double> knots_;
};

// Multilinear interpolation between points of a rectangular grid, row-major in its axes; each point is a
// vector of `width` numbers. Exact on the grid, clamped to its edge outside.
class Grid {
  public:
    Grid(std::vector<Axis> axes, std::vector<double> values)
        : axes(std::move(axes)), values(std::move(values)), width(this->values.size()) {
        for (const Axis& axis : this->axes) {
            if (width % axis.values.size() != 0) throw std::invalid_argument("a grid that lacks points");
            width /= axis.values.size();
        }
        if (width == 0) throw std::invalid_argument("a grid without values");
    }

    // Writes `width` numbers; whether the place, a number for each axis, is outside the grid.
    bool at(const double* place, double* blend) const {
        std::fill_n(blend, width, 0.0);
        return add(axes.data(), place, 0, 1.0, blend);
    }

    std::vector<Axis> axes;
    std::vector<double> values;
    std::size_t width;

  private:
    // Adds the corners that begin with `point`, the index so far, in row-major order.
    bool add(const Axis* axis, const double* place, std::size_t point, double weight, double* blend) const {
        if (axis == axes.data() + axes.size()) {
            const double* corner = values.data() + point * width;
            for (std::size_t i = 0; i < width; ++i) blend[i] += weight * corner[i];
            return false;
        }
        const Axis::Place at = axis->place(*place);
        bool outside = at.outside;
        for (std::size_t j = 0; j < at.neighbours; ++j) {
            const std::size_t next = point * axis->values.size() + at.first + j;
            outside = add(axis + 1, place + 1, next, weight * at.weights[j], blend) || outside;
        }
        return outside;
    }
};

// Seconds of a decode step by the KV tokens it reads: piecewise linear between knots, flat beyond them.
// Outside `low` to `high` is outside the measured grid; with `outside`, everything is.
class Curve {
  public:
    Curve(std::vector<double> kv_tokens, std::vector<double> seconds, double low, double high, bool outside)
        : kv_(std::move(kv_tokens)), seconds_(std::move(seconds)), low_(low), high_(high), outside_(outside) {
        if (kv_.empty() || kv_.size() != seconds_.size())
            throw std::invalid_argument("a curve needs as many knots as times");
    }

    // Writes the seconds of so many steps, each of which reads `more` tokens more than the one before; how
    // many are outside.
    std::size_t at(std::int64_t kv_tokens, std::int64_t more, std::size_t count, double* seconds) const {
        std::size_t outside = 0, knot = 0;
        for (std::size_t i = 0; i < count; ++i, kv_tokens += more) {
            const auto x = static_cast<double>(kv_tokens);
            knot = find(x, knot);
            seconds[i] = between(x, knot);
            outside += outside_ || x < low_ || x > high_;
        }
        return outside;
    }

    // This curve with the time at each knot divided by what a grid of vectors has for it at a place: the
    // share of its speed that is left.
    Curve at_speed(const Grid& grid, const double* place, double low, double high) const {
        if (grid.width != seconds_.size()) throw std::invalid_argument("a speed for each knot is needed");
        std::vector<double> seconds(grid.width);
        const bool outside = grid.at(place, seconds.data());
        for (std::size_t i = 0; i < seconds.size(); ++i) seconds[i] = seconds_[i] / seconds[i];
        return {kv_, std::move(seconds), low, high, outside_ || outside};
    }

  private:
    // Last knot that is not above x (the first one if none is); mostly that of the step before, or the next.
    std::size_t find(double x, std::size_t knot) const {
        while (knot + 1 < kv_.size() && kv_[knot + 1] <= x) ++knot;
        return knot;
    }

    double between(double x, std::size_t knot) const {
        if (x <= kv_[knot] || knot + 1 == kv_.size()) return seconds_[knot];
        const double slope = (seconds_[knot + 1] - seconds_[knot]) / (kv_[knot + 1] - kv_[knot]);
        return slope * (x - kv_[knot]) + seconds_[knot];
    }

    std::vector<double> kv_;
    std::vector<double> seconds_;
    double low_;
    double high_;
    bool outside_;
};

// When the steps of a run in flight end. A *stretch* is a time over which prices hold; it may begin within a
// step, of which the share that is left then goes on at the new price. The first step begins at `begin_s`.
class Boundaries {
  public:
    Boundaries(double start_s, std::size_t steps)
        : begin_s(start_s), start_s_(start_s), stretch_s_(start_s), steps_(steps) {}

    double begin_s;

    // Boundaries in earlier stretches, and those that are left.
    std::size_t done() const { return done_; }
    std::size_t left() const { return steps_ - done_; }
    std::size_t steps() const { return steps_; }
    // The last boundary known; minus infinity before the first price.
    double priced_to_s() const { return priced_to_s_; }
    // The end of the run, infinite while that is further than was priced.
    double end_s() const {
        return ends_.size() == steps_ ? priced_to_s_ : std::numeric_limits<double>::infinity();
    }
    const std::vector<double>& ends() const { return ends_; }

    // Boundaries reached, one at this moment included.
    std::size_t reached(double now_s) const {
        return std::upper_bound(ends_.begin() + offset(), ends_.end(), now_s) - ends_.begin();
    }

    // Leaves the present stretch now, or at the last boundary known if that comes first. How many of its
    // steps were worked on; of one that has only begun, none.
    std::size_t leave(double now_s) {
        if (seconds_.empty()) return 0;
        now_s = std::min(now_s, priced_to_s_);
        if (stretch_s_ == now_s && now_s < priced_to_s_) return 0;
        const std::size_t reached_now = reached(now_s), reached_here = reached_now - done_;
        const double last_s = reached_now ? ends_[reached_now - 1] : start_s_;
        const bool within = now_s > std::max(last_s, begin_s);
        rest_ = within ? (ends_[reached_now] - now_s) / seconds_[reached_here] : 1.0;
        done_ = reached_now;
        stretch_s_ = now_s;
        return reached_here + within;
    }

    // Prices so many steps from `done` on, of those that are left; the stretch is as long as that.
    void price(const double* seconds, std::size_t count) {
        seconds_.assign(seconds, seconds + std::min(count, steps_ - done_));
        add_up();
    }

    // Likewise, at the same price each.
    void price_evenly(double seconds, std::size_t count) {
        seconds_.assign(std::min(count, steps_ - done_), seconds);
        add_up();
    }

    // Ends the run at the first boundary from now on, and that is now when it is at one, other than its
    // start.
    void stop(double now_s) {
        std::size_t steps = done_;
        if (done_ == 0 || ends_[done_ - 1] != now_s) {
            steps = std::lower_bound(ends_.begin() + offset(), ends_.end(), now_s) - ends_.begin() + 1;
        }
        if (steps >= steps_) return;
        steps_ = steps;
        if (seconds_.empty()) return;
        ends_.resize(steps_);
        priced_to_s_ = steps_ ? ends_.back() : start_s_;
    }

  private:
    // One by one, as runs of single steps would be.
    void add_up() {
        ends_.resize(done_ + seconds_.size());
        double end_s = std::max(stretch_s_, begin_s), share = rest_;
        for (std::size_t i = 0; i < seconds_.size(); ++i) {
            end_s += share * seconds_[i];
            ends_[done_ + i] = end_s;
            share = 1.0;
        }
        priced_to_s_ = end_s;
    }

    std::ptrdiff_t offset() const { return static_cast<std::ptrdiff_t>(done_); }

    double start_s_;
    double stretch_s_;
    double priced_to_s_ = -std::numeric_limits<double>::infinity();
    double rest_ = 1.0;  // share of the stretch's first step that is still to do
    std::size_t steps_;  // at which the run ends
    std::size_t done_ = 0;
    std::vector<double> seconds_;  // what each step of the stretch takes as a whole
    std::vector<double> ends_;     // boundaries of all stretches
};

}  // namespace semipd
