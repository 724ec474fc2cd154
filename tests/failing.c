// failing.c - train on a backend that fails on request, as a machine does that has run out of memory: a kernel cannot run
// any more, while what was learnt is still there. tests/programs.sh checks that train then keeps it.
//
//   FAIL_FROM=n FAIL_TO=m build/train-failing FILE ...     calls n to m of embedding_forward fail, the first kernel of each
//                                                          pass: of a gradient, a validation, a token of a sample

#define metala_cpu failing_cpu
#include "../train.c"
#undef metala_cpu

const metala_backend *metala_cpu(void);

static int number_in(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static void failing_embedding(metala_context *c, metala_real *x, const int *tokens, const metala_real *E, size_t rows,
                              size_t D, double scale) {
    static int calls;
    calls++;
    if (calls >= number_in("FAIL_FROM", INT_MAX) && calls <= number_in("FAIL_TO", INT_MAX))
        metala_context_fail(c, "call %d failed on request", calls);
    else metala_cpu()->embedding_forward(c, x, tokens, E, rows, D, scale);
}

const metala_backend *failing_cpu(void) {
    static metala_backend table;
    table = *metala_cpu();
    table.embedding_forward = failing_embedding;
    return &table;
}
