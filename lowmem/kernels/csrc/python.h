/* Python's C interface: the limited one, so that one binary works with every Python from 3.10 on. */
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
