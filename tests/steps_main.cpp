// Random grids, curves and runs under the sanitizers; that results are right is for test_steps.py to say.
#include <cstdio>
#include <random>

#include "steps.hpp"
#include "waves.hpp"

namespace {

using Random = std::mt19937;

int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

std::vector<double> ascending(Random& random) {
    std::vector<double> values;
    for (double x = 0; static_cast<int>(values.size()) <= pick(random, 0, 4);)
        values.push_back(x += pick(random, 1, 9));
    return values;
}

double look_up(Random& random) {
    std::vector<semipd::Axis> axes;
    std::size_t points = 1;
    for (int n = pick(random, 1, 4); n > 0; --n) {
        const std::vector<double> values = ascending(random);
        axes.emplace_back(values, values.front(), values.back(), pick(random, 0, 1) == 1, pick(random, 0, 3));
        points *= values.size();
    }
    const std::size_t width = pick(random, 1, 3);
    const semipd::Grid grid(axes, std::vector<double>(points * width, 1.0));
    std::vector<double> blend(width), place(axes.size());
    for (double& x : place) x = pick(random, 1, 60) / 2.0;
    grid.at(place.data(), blend.data());

    const std::vector<double> knots = ascending(random);
    const semipd::Curve curve(knots, knots, 2, 9, false);
    const semipd::Grid factors({semipd::Axis(knots, 1, 9, true, 0)},
                               std::vector<double>(knots.size() * knots.size(), 2));
    std::vector<double> seconds(pick(random, 0, 5));
    curve.at_speed(factors, place.data(), 1, 20)
        .at(pick(random, 0, 50), pick(random, 1, 9), seconds.size(), seconds.data());
    return blend[0] + (seconds.empty() ? 0 : seconds.back());
}

double run(Random& random) {
    semipd::Boundaries boundaries(0.0, pick(random, 1, 8));
    boundaries.begin_s = pick(random, 0, 2);
    for (double now_s = 0; boundaries.end_s() > now_s; now_s += pick(random, 0, 3) / 2.0) {
        if (pick(random, 0, 5) == 0) boundaries.stop(now_s);
        boundaries.leave(now_s);
        const std::vector<double> seconds(pick(random, 1, 8), 0.75);
        if (boundaries.done() == boundaries.steps()) break;
        boundaries.price(seconds.data(), seconds.size());
        boundaries.reached(now_s);
    }
    return boundaries.ends().empty() ? 0.0 : boundaries.ends().back();
}

double attention(Random& random) {
    std::vector<std::int64_t> tokens(pick(random, 1, 5)), kv_lens(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        tokens[i] = pick(random, 1, 400);
        kv_lens[i] = tokens[i] + pick(random, 0, 4000);
    }
    const semipd::Waves waves(32, pick(random, 1, 32), pick(random, 1, 300), pick(random, 0, 1 << 28));
    return waves.best(tokens, kv_lens, pick(random, 1, 132)).us;
}

}  // namespace

int main() {
    Random random(1);
    double sum = 0;
    for (int i = 0; i < 20000; ++i) sum += look_up(random) + run(random) + attention(random);
    std::printf("20000 look-ups and runs, %g\n", sum);
}
