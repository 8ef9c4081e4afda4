/* Return codes of the core. Every check that a caller's numbers fail has one. */
#ifndef TM_ERRORS_H
#define TM_ERRORS_H

enum {
    TM_OK = 0,
    TM_ERR_ROUTE = -1,    /* an expert id outside the layer, or of an expert that has no weights here */
    TM_ERR_ROOM = -2,     /* more rows, experts per row or columns than the work was made for */
    TM_ERR_SHAPE = -3,    /* a matrix whose format and shape do not exist, or do not fit together */
    TM_ERR_TYPE = -4,     /* an unknown element type or activation function */
    TM_ERR_ERRAND = -5    /* a bell rung for an errand that does not exist */
};

#endif
