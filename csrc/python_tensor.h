// SPDX-License-Identifier: Apache-2.0
// A PyTorch tensor as Python passes it, read without a header of PyTorch: through DLPack's C exchange API
// (https://dmlc.github.io/dlpack/latest/c_api.html, stable within its major version), at 80 ns a tensor.
// PyTorch before 2.10 has none; its tensors are asked for their attributes. Only bindings.cpp includes this.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "common/dtype.h"

namespace cogview {

// What compiled code wants to know of a tensor; all zero for None.
struct PythonTensor {
    void* data = nullptr;
    int bytes = 0;                                  // of an element
    DType dtype = DType::kFloat32;                  // of a tensor of floats
    int64_t elements = 0, last = 0;                 // how many there are; the size of the last dimension
    std::array<int64_t, 4> size = {}, stride = {};  // of the first four dimensions
};

namespace dlpack {

struct Device {
    int32_t type, id;
};
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
// The functions are named as in DLPack; those that nobody calls here have the type void*.
struct ExchangeApi {
    uint32_t major, minor;
    const ExchangeApi* older;
    void *managed_tensor_allocator, *managed_tensor_from_py_object, *managed_tensor_to_py_object;
    int (*dltensor_from_py_object)(void*, Tensor*);
    void* current_work_stream;
};
constexpr uint32_t kMajor = 1;
constexpr uint8_t kBfloat = 4;
constexpr int32_t kCpu = 1;

// nullptr where this PyTorch has none.
inline const ExchangeApi* exchange_api() {
    static const ExchangeApi* const found = [] {
        namespace py = pybind11;
        const py::object type = py::module_::import("torch").attr("Tensor");
        const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
        if (!PyCapsule_CheckExact(capsule.ptr())) return static_cast<const ExchangeApi*>(nullptr);
        auto* api =
            static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api == nullptr) throw py::error_already_set();
        while (api != nullptr && api->major > kMajor) api = api->older;
        return api != nullptr && api->dltensor_from_py_object != nullptr ? api : nullptr;
    }();
    return found;
}

}  // namespace dlpack

inline PythonTensor from_dlpack(const dlpack::Tensor& x) {
    PythonTensor to;
    to.data = static_cast<char*>(x.data) + x.byte_offset;
    to.bytes = x.dtype.bits / 8;
    to.dtype = x.dtype.bits == 32                ? DType::kFloat32
               : x.dtype.code == dlpack::kBfloat ? DType::kBFloat16
                                                 : DType::kFloat16;
    to.elements = 1;
    for (int i = 0; i < x.ndim; ++i) to.elements *= x.shape[i];
    to.last = x.ndim > 0 ? x.shape[x.ndim - 1] : 1;
    const int known = std::min(x.ndim, 4);
    std::copy_n(x.shape, known, to.size.begin());
    std::copy_n(x.strides, known, to.stride.begin());
    return to;
}

inline PythonTensor from_attributes(pybind11::handle x) {
    namespace py = pybind11;
    PythonTensor to;
    to.data = reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>());
    to.bytes = x.attr("element_size")().cast<int>();
    const std::string dtype = py::str(x.attr("dtype"));
    to.dtype = dtype == "torch.bfloat16"  ? DType::kBFloat16
               : dtype == "torch.float16" ? DType::kFloat16
                                          : DType::kFloat32;
    const py::tuple shape = x.attr("shape"), stride = x.attr("stride")();
    to.elements = x.attr("numel")().cast<int64_t>();
    to.last = shape.empty() ? 1 : shape[shape.size() - 1].cast<int64_t>();
    for (size_t i = 0; i < std::min<size_t>(shape.size(), 4); ++i) {
        to.size[i] = shape[i].cast<int64_t>();
        to.stride[i] = stride[i].cast<int64_t>();
    }
    return to;
}

inline PythonTensor read_tensor(pybind11::handle x) {
    if (x.is_none()) return {};
    const dlpack::ExchangeApi* api = dlpack::exchange_api();
    if (api == nullptr) return from_attributes(x);
    dlpack::Tensor found;
    if (api->dltensor_from_py_object(x.ptr(), &found) != 0) throw pybind11::error_already_set();
    return from_dlpack(found);
}

// What a signature begins with. Direct: all tensors have their values in the CPU's memory and none is to get
// a gradient, so a kernel can take them as they are. Recorded: one is to get a gradient.
constexpr char kDirect = 'd', kRecorded = 'r', kNeither = '-';

// Bytes that are equal for two calls whose arguments have the same types, numbers, strings and dtypes and,
// where they are tensors, the same devices, dtypes, shapes and strides, and which begin with one of the
// above. None for an argument that is none of these, for a tensor of a subclass or without memory, and for
// every tensor where there is no exchange API. `recording`: whether operations on tensors that require a
// gradient are recorded.
inline pybind11::object signature(bool recording, const pybind11::args& arguments) {
    namespace py = pybind11;
    static const py::object tensor = py::module_::import("torch").attr("Tensor");
    static const py::object parameter = py::module_::import("torch").attr("nn").attr("Parameter");
    static const py::object dtype = py::module_::import("torch").attr("dtype");
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    std::string key(1, kDirect);
    const auto put = [&key](char kind, const void* from, size_t bytes) {
        key.push_back(kind);
        key.append(static_cast<const char*>(from), bytes);
    };
    const auto is_true = [](PyObject* answer) {
        if (answer == nullptr) throw py::error_already_set();
        Py_DECREF(answer);  // True and False outlive it
        return answer == Py_True;
    };
    for (py::handle argument : arguments) {
        PyObject* x = argument.ptr();
        const auto type = reinterpret_cast<PyObject*>(Py_TYPE(x));
        if (type == tensor.ptr() || type == parameter.ptr()) {
            const dlpack::ExchangeApi* api = dlpack::exchange_api();
            dlpack::Tensor found;
            if (api == nullptr) return py::none();
            if (api->dltensor_from_py_object(x, &found) != 0) {
                PyErr_Clear();
                return py::none();
            }
            put('t', &found.device, sizeof(found.device));
            put('d', &found.dtype, sizeof(found.dtype));
            put(char(found.ndim), found.shape, found.ndim * sizeof(int64_t));
            put('s', found.strides, found.ndim * sizeof(int64_t));
            if (recording && key[0] != kRecorded && is_true(PyObject_GetAttr(x, requires_grad)))
                key[0] = kRecorded;
            // Zeros without memory have no address, and what is_neg() tells lies there with the other sign.
            if (key[0] == kDirect && (found.device.type != dlpack::kCpu || found.data == nullptr ||
                                      is_true(PyObject_CallMethodNoArgs(x, is_neg))))
                key[0] = kNeither;
        } else if (PyFloat_CheckExact(x)) {
            const double value = PyFloat_AS_DOUBLE(x);
            put('f', &value, sizeof(value));
        } else if (PyLong_CheckExact(x)) {
            int overflow;
            const int64_t value = PyLong_AsLongLongAndOverflow(x, &overflow);
            if (overflow != 0) return py::none();
            put('i', &value, sizeof(value));
        } else if (PyUnicode_CheckExact(x)) {
            Py_ssize_t bytes;
            const char* value = PyUnicode_AsUTF8AndSize(x, &bytes);
            if (value == nullptr) {
                PyErr_Clear();
                return py::none();
            }
            put('s', &bytes, sizeof(bytes));
            key.append(value, bytes);
        } else if (type == dtype.ptr()) {
            put('D', &x, sizeof(x));  // PyTorch has one object for each, which it keeps
        } else if (argument.is_none() || PyBool_Check(x)) {
            key.push_back(argument.is_none() ? 'n' : x == Py_True ? '1' : '0');
        } else {
            return py::none();
        }
    }
    return py::bytes(key);
}

}  // namespace cogview

namespace pybind11::detail {

template <>
struct type_caster<cogview::PythonTensor> {
    PYBIND11_TYPE_CASTER(cogview::PythonTensor, const_name("Tensor | None"));
    bool load(handle source, bool) {
        value = cogview::read_tensor(source);
        return true;
    }
};

}  // namespace pybind11::detail
