/* A Python extension that refuses, as NumPy's core does, to be loaded for a second time in one process. */

#include <Python.h>

static int loaded;

static int execute(PyObject *module)
{
    (void)module;
    if (loaded++) {
        PyErr_SetString(PyExc_ImportError, "cannot load module more than once per process");
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef once = {PyModuleDef_HEAD_INIT, "once", NULL, 0, NULL, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_once(void)
{
    return PyModuleDef_Init(&once);
}
