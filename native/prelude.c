/*
 * prelude.c - what the C file that cffi generates includes before its own code: the declarations, as C sees them.
 * It is text for cffi (see CMakeLists.txt), not a source of the core.
 */
#include "sa.h"
