// Exact attention over one visiting chunk on a CPU.
//
// One unit of all its parts, since both directions are made of the same
// templates: units of their own take a quarter longer to compile.

#include "backward.cpp"
#include "forward.cpp"
#include "pool.cpp"
