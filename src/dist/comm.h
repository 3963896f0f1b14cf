/* What the ranks of a job say to each other: collective calls over host memory, each with a name, a deadline and a check that all ranks
 * make the same call.
 *
 * A transport (alone, simulated, TCP, MPI) moves one message from every rank to every rank and knows nothing else.  Before the messages
 * of a call every pair exchanges headers, so a rank that went another way, or another size than was agreed, is found before any byte lands.
 *
 * All sums are made in rank order, element by element: the same bits for the same ranks, whatever the transport. */
#ifndef ESPI_DIST_COMM_H
#define ESPI_DIST_COMM_H

#include "espalier/ctx.h"
#include "espalier/tensor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What goes to, or comes from, one rank.  bytes = 0: nothing is sent, and the peer knows. */
typedef struct espi_message {
    void *data;
    size_t bytes;
} espi_message;

/* Where in the work a call stands; layer -1: in none. */
typedef struct espi_place {
    const char *what; /* "rows to the experts"; a literal */
    int64_t layer;
} espi_place;

typedef struct espi_transport {
    const char *name; /* "alone", "simulated", "tcp", "mpi" */
    /* send[r] goes to rank r, recv[r] comes from it; sizes are those the peers have too; the own rank's is copied.  deadline: seconds of the
     * monotonic clock.  ESP_ERR_COMM with a sentence that names the ranks that did not come. */
    esp_status (*transfer)(void *self, const espi_message *send, const espi_message *recv, double deadline);
    /* Ends the job from this rank, as far as the transport can; a program then exits with `code`. */
    void (*end_job)(void *self, int code);
    /* broken: a call failed, the peers may be gone. */
    void (*close)(void *self, bool broken);
    /* Whether a rank has left.  Called by another thread, at any time; NULL: cannot be told. */
    bool (*lost)(void *self);
    bool leave_together; /* no rank may close while another still needs it */
} espi_transport;

/* How long a call waits for the others, where nothing else is said; seconds. */
#define ESPI_COMM_PATIENCE 300.0

/* start.c.  As the environment says: alone, by hand (ESP_RANK, ESP_WORLD, ESP_RENDEZVOUS), or under mpirun.  ESP_DEADLINE: the patience in seconds. */
esp_status espi_comm_start(esp_comm **comm, int *argc, char ***argv);

/* `self` belongs to the communicator, also when this fails. */
esp_status espi_comm_make(esp_comm **comm, const espi_transport *transport, void *self, int rank, int size);

/* start.c.  Rank `rank` of `size` for a plan: it can say so, and nothing to anybody. */
esp_status espi_comm_imagine(esp_comm **comm, int rank, int size);

/* comm_simulated.c: `size` communicators for as many threads of this process. */
esp_status espi_comm_simulate(esp_comm **comms, int size);
/* comm_tcp.c.  rendezvous: "host:port" where rank 0 listens, or "file:DIR", a folder that all ranks see. */
esp_status espi_comm_tcp(esp_comm **comm, int rank, int size, const char *rendezvous, double patience);
/* comm_mpi.c.  ESP_ERR_UNSUPPORTED where this build or machine has no MPI. */
esp_status espi_comm_mpi(esp_comm **comm, int *argc, char ***argv);

/* Calls made so far: tests count them. */
uint64_t espi_comm_calls(const esp_comm *comm);
/* Collective: settles esp_comm_local_rank(); host: the same number on ranks of one host alone. */
esp_status espi_comm_find_hosts(esp_comm *comm, uint64_t host);
/* start.c.  That number of this process. */
uint64_t espi_comm_host(void);
/* How long a call waits for the others; seconds. */
void espi_comm_patience(esp_comm *comm, double seconds);
double espi_comm_patience_of(const esp_comm *comm);
/* Something beside these calls went wrong between the ranks (link.h), late: for a deadline that passed.  All later calls fail. */
void espi_comm_break(esp_comm *comm, bool late);
bool espi_comm_broken(const esp_comm *comm);
/* "\"rows to the experts\", layer 3" */
#define ESPI_PLACE_TEXT 128
void espi_place_text(char text[ESPI_PLACE_TEXT], espi_place place);

/* out [size][bytes] in rank order, from each rank's `in` [bytes]. */
esp_status espi_comm_gather(esp_comm *comm, espi_place place, void *out, const void *in, size_t bytes);
/* Rows from every rank to every rank, of one array or of several that go together.  Of each rank: rows[r] rows, from row at[r] on.
 * ESP_ERR_MISMATCH when a peer sends another number than was expected. */
typedef struct espi_row_ranges {
    const int64_t *at, *rows; /* [size] */
} espi_row_ranges;
typedef struct espi_row_array {
    void *to;
    const void *from;
    size_t row_bytes;
} espi_row_array;
esp_status espi_comm_exchange(esp_comm *comm, espi_place place, const espi_row_array *arrays, int n_arrays, espi_row_ranges to,
                              espi_row_ranges from);
/* Messages of `n` arrays: [n][size], sent to and received from each rank, in sizes that the peers have too. */
esp_status espi_comm_messages(esp_comm *comm, espi_place place, const espi_message *send, const espi_message *recv, int n);
/* total += partial of rank 0, then of rank 1, ..: on every rank the same bits.  n values of F32 or F64.
 * scratch: espi_comm_add_bytes() bytes, for pieces of espi_comm_piece() values of every rank. */
int64_t espi_comm_piece(const esp_comm *comm);
size_t espi_comm_add_bytes(const esp_comm *comm);
esp_status espi_comm_add(esp_comm *comm, espi_place place, void *total, const void *partial, int64_t n, esp_dtype dtype, void *scratch);
/* ESP_OK when every rank says ESP_OK; otherwise the status of the lowest rank that does not, with its sentence, on all of them. */
esp_status espi_comm_agree(esp_comm *comm, espi_place place, esp_status mine);
/* Nobody goes on before all have come. */
esp_status espi_comm_meet(esp_comm *comm, espi_place place);
/* ESP_ERR_MISMATCH, naming the key and the ranks, when `value` is not the same everywhere. */
esp_status espi_comm_same(esp_comm *comm, const char *key, uint64_t value);

#endif
