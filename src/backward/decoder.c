typedef int espi_stub; /* being written */
