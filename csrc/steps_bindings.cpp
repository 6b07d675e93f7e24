// Names for Python; no logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "steps.hpp"
#include "waves.hpp"

namespace py = pybind11;
using semipd::Axis;
using semipd::Boundaries;
using semipd::Curve;
using semipd::Grid;
using semipd::Waves;
using Floats = py::array_t<double, py::array::c_style | py::array::forcecast>;

namespace {

std::vector<double> numbers(const Floats& array) { return {array.data(), array.data() + array.size()}; }

Floats array(const std::vector<double>& numbers) { return Floats(numbers.size(), numbers.data()); }

// The place, a number for each axis, as Python's arguments.
std::vector<double> place(const Grid& grid, const py::args& given) {
    if (given.size() != grid.axes.size()) throw py::type_error("expected a number for each axis");
    std::vector<double> place;
    place.reserve(given.size());
    for (const py::handle& number : given) place.push_back(number.cast<double>());
    return place;
}

// What is read after each change, in the same call: a call takes longer than what it does.
std::pair<double, double> horizon(const Boundaries& boundaries) {
    return {boundaries.priced_to_s(), boundaries.end_s()};
}

}  // namespace

PYBIND11_MODULE(_steps, m) {
    m.doc() = "What steps cost and when they end; semipd.table_cost and semipd.sim say what for.";

    py::class_<Axis>(m, "Axis")
        .def(py::init<std::vector<double>, double, double, bool, double>(), py::arg("values"), py::arg("low"),
             py::arg("high"), py::arg("log"), py::arg("offset") = 0.0)
        .def_readonly("low", &Axis::low)
        .def_readonly("high", &Axis::high)
        .def(py::pickle(
            [](const Axis& axis) {
                return py::make_tuple(axis.values, axis.low, axis.high, axis.log, axis.offset);
            },
            [](const py::tuple& state) {
                return Axis(state[0].cast<std::vector<double>>(), state[1].cast<double>(),
                            state[2].cast<double>(), state[3].cast<bool>(), state[4].cast<double>());
            }));

    using Lengths = std::vector<std::int64_t>;
    m.attr("CTAS_OF_SM") = semipd::CTAS_OF_SM;
    py::class_<Waves>(m, "Waves")
        .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), py::arg("query_heads"),
             py::arg("kv_heads"), py::arg("head_dim"), py::arg("workspace_bytes"))
        .def("tile_rows", &Waves::tile_rows, py::arg("new_tokens"))
        .def("partial_bytes", &Waves::partial_bytes, py::arg("rows"))
        .def(
            "chunks",
            [](const Waves& waves, const Lengths& new_tokens, const Lengths& kv_lens, std::int64_t sms) {
                return waves.best(new_tokens, kv_lens, sms).ctas;
            },
            py::arg("new_tokens"), py::arg("kv_lens"), py::arg("sms"))
        .def(
            "seconds",
            [](const Waves& waves, const Lengths& new_tokens, const Lengths& context_lens, std::int64_t sms) {
                Lengths kv_lens(context_lens);
                for (std::size_t i = 0; i < std::min(kv_lens.size(), new_tokens.size()); ++i)
                    kv_lens[i] += new_tokens[i];
                return waves.best(new_tokens, kv_lens, sms).us / 1e6;
            },
            py::arg("new_tokens"), py::arg("context_lens"), py::arg("sms"))
        .def(py::pickle(
            [](const Waves& waves) {
                return py::make_tuple(waves.query_heads, waves.kv_heads, waves.head_dim,
                                      waves.workspace_bytes);
            },
            [](const py::tuple& state) {
                return Waves(state[0].cast<std::int64_t>(), state[1].cast<std::int64_t>(),
                             state[2].cast<std::int64_t>(), state[3].cast<std::int64_t>());
            }));

    py::class_<Grid>(m, "Grid")
        .def(py::init([](std::vector<Axis> axes, const Floats& values) {
                 return Grid(std::move(axes), numbers(values));
             }),
             py::arg("axes"), py::arg("values"))
        .def_readonly("axes", &Grid::axes)
        .def("number",
             [](const Grid& grid, const py::args& given) {
                 if (grid.width != 1) throw py::type_error("a grid of vectors");
                 double blend = 0;
                 const bool outside = grid.at(place(grid, given).data(), &blend);
                 return std::pair(blend, outside);
             })
        .def("vector",
             [](const Grid& grid, const py::args& given) {
                 Floats blend(grid.width);
                 const bool outside = grid.at(place(grid, given).data(), blend.mutable_data());
                 return std::pair(blend, outside);
             })
        .def(py::pickle([](const Grid& grid) { return py::make_tuple(grid.axes, array(grid.values)); },
                        [](const py::tuple& state) {
                            return Grid(state[0].cast<std::vector<Axis>>(), numbers(state[1].cast<Floats>()));
                        }));

    py::class_<Curve>(m, "Curve")
        .def(py::init(
                 [](const Floats& kv_tokens, const Floats& seconds, double low, double high, bool outside) {
                     return Curve(numbers(kv_tokens), numbers(seconds), low, high, outside);
                 }),
             py::arg("kv_tokens"), py::arg("seconds"), py::arg("low"), py::arg("high"), py::arg("outside"))
        .def(
            "at",
            [](const Curve& curve, std::int64_t kv_tokens, std::int64_t more, std::size_t steps) {
                Floats seconds(steps);
                const std::size_t outside = curve.at(kv_tokens, more, steps, seconds.mutable_data());
                return std::pair(seconds, outside);
            },
            py::arg("kv_tokens"), py::arg("more"), py::arg("steps"))
        .def(
            "at_speed",
            [](const Curve& curve, const Grid& grid, double low, double high, const py::args& given) {
                return curve.at_speed(grid, place(grid, given).data(), low, high);
            },
            py::arg("grid"), py::arg("low"), py::arg("high"));

    py::class_<Boundaries>(m, "Boundaries")
        .def(py::init<double, std::size_t>(), py::arg("start_s"), py::arg("steps"))
        .def_readwrite("begin_s", &Boundaries::begin_s)
        .def("reached", &Boundaries::reached, py::arg("now_s"))
        .def(
            "leave",
            [](Boundaries& boundaries, double now_s) {
                const std::size_t worked = boundaries.leave(now_s);
                return py::make_tuple(worked, boundaries.done(), boundaries.left());
            },
            py::arg("now_s"))
        .def(
            "price",
            [](Boundaries& boundaries, const Floats& seconds) {
                boundaries.price(seconds.data(), seconds.size());
                return horizon(boundaries);
            },
            py::arg("seconds"))
        .def(
            "price_evenly",
            [](Boundaries& boundaries, double seconds, std::size_t steps) {
                boundaries.price_evenly(seconds, steps);
                return horizon(boundaries);
            },
            py::arg("seconds"), py::arg("steps"))
        .def(
            "stop",
            [](Boundaries& boundaries, double now_s) {
                boundaries.stop(now_s);
                return horizon(boundaries);
            },
            py::arg("now_s"))
        .def("ends_s", [](const Boundaries& boundaries) { return array(boundaries.ends()); });
}
