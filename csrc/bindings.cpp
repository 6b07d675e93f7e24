// Names for Python; no logic. Every driver call, destructors included, runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "green_context.hpp"

namespace py = pybind11;
using semipd::CudaError;
using semipd::Device;
using semipd::Partition;
using semipd::PrimaryContext;
using semipd::PriorityRange;
using semipd::SmResource;
using semipd::SplitPlan;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace {

// Owns an object for Python whose destructor calls the driver. The last reference may also be one that
// another object drops in its own destructor, where the GIL is released already.
template <class T>
std::shared_ptr<T> hold(std::unique_ptr<T> object) {
    return std::shared_ptr<T>(object.release(), [](T* released) {
        std::optional<py::gil_scoped_release> without_gil;
        if (PyGILState_Check() == 1) without_gil.emplace();
        delete released;
    });
}

template <class Create>
auto without_gil(Create create) {
    const py::gil_scoped_release release;
    return create();
}

// Of a property that asks the driver.
template <class Method>
py::cpp_function asking(Method method) {
    return py::cpp_function(method, NoGil());
}

std::pair<std::shared_ptr<Partition>, std::shared_ptr<Partition>> create_split(
    const std::shared_ptr<PrimaryContext>& context, int requested, bool ignore_coscheduling,
    int primary_priority, int remaining_priority) {
    auto split = without_gil([&] {
        return semipd::create_split(context, requested, ignore_coscheduling, primary_priority,
                                    remaining_priority);
    });
    return {hold(std::move(split.first)), hold(std::move(split.second))};
}

void register_error(py::module_& m) {
    static PyObject* type = nullptr;  // never released: translators outlive the module
    type = PyErr_NewExceptionWithDoc(
        "semipd.CudaError",
        "A CUDA call that failed or was refused.\n\n"
        "``code``: the CUresult's number, ``name``: its name, ``call``: the function.",
        PyExc_RuntimeError, nullptr);
    if (type == nullptr) throw py::error_already_set();
    m.attr("CudaError") = py::handle(type);
    py::register_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const CudaError& error) {
            py::object exception = py::reinterpret_borrow<py::object>(type)(error.what());
            exception.attr("code") = static_cast<int>(error.code());
            exception.attr("name") = error.name();
            exception.attr("call") = error.call();
            PyErr_SetObject(type, exception.ptr());
        }
    });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "SM partitions with CUDA green contexts. Imports without a driver; opens it on first use.";
    register_error(m);

    py::class_<SmResource>(m, "SmResource")
        .def_readonly("count", &SmResource::count)
        .def_readonly("minimum", &SmResource::minimum)
        .def_readonly("multiple", &SmResource::multiple);

    py::class_<SplitPlan>(m, "SplitPlan")
        .def_readonly("requested", &SplitPlan::requested)
        .def_readonly("granted", &SplitPlan::granted)
        .def_readonly("remaining", &SplitPlan::remaining);

    py::class_<Device>(m, "Device")
        .def(py::init<int>(), py::arg("index") = 0, NoGil())
        .def_static("current", &Device::current, NoGil())
        .def_property_readonly("index", &Device::index)
        .def_property_readonly("name", asking(&Device::name))
        .def_property_readonly("compute_capability", asking(&Device::compute_capability))
        .def_property_readonly("driver_version", asking(&Device::driver_version))
        .def("resource", &Device::resource, py::arg("ignore_coscheduling") = false, NoGil())
        .def("plan", &Device::plan, py::arg("requested"), py::arg("ignore_coscheduling") = false, NoGil());

    py::class_<Partition, std::shared_ptr<Partition>>(m, "Partition")
        .def_property_readonly(
            "stream", [](const Partition& p) { return reinterpret_cast<std::uintptr_t>(p.stream()); })
        .def_property_readonly("sms", &Partition::sms)
        .def_property_readonly("priority", &Partition::priority)
        .def("synchronize", &Partition::synchronize, NoGil());

    py::class_<PriorityRange>(m, "PriorityRange")
        .def_readonly("least", &PriorityRange::least)
        .def_readonly("greatest", &PriorityRange::greatest);

    py::class_<PrimaryContext, std::shared_ptr<PrimaryContext>>(m, "PrimaryContext")
        .def(py::init([](const Device& device) {
                 return hold(without_gil([&] { return std::make_unique<PrimaryContext>(device); }));
             }),
             py::arg("device"))
        .def_property_readonly("priorities", asking(&PrimaryContext::priorities))
        .def_property_readonly("free_bytes", asking(&PrimaryContext::free_bytes))
        .def("create_split", &create_split, py::arg("requested"), py::arg("ignore_coscheduling"),
             py::arg("primary_priority"), py::arg("remaining_priority"))
        .def(
            "create_stream",
            [](const std::shared_ptr<PrimaryContext>& context, int priority) {
                return hold(without_gil([&] { return std::make_unique<Partition>(context, priority); }));
            },
            py::arg("priority"));

    m.def("release_idle", &semipd::release_idle, NoGil(),
          "Destroy the green contexts that closed partitions left idle; partitions in use are left alone.\n\n"
          "On drivers such as 580 a destroyed green context's memory comes back only when its primary\n"
          "context goes: when nothing else in the process retains that, be it a partition, a\n"
          "``PrimaryContext`` or torch.");
}
