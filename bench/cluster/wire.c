/*  wire.c - simulates a network with a delay and a rate between network namespaces of one machine.

    wire DELAY_US MBIT_S N

    Makes N network devices wire1 to wireN, which the caller moves into the namespaces, and prints a line when they
    exist. A frame passes the sending host's link at MBIT_S, and reaches the other host DELAY_US later. Runs until it is
    stopped. Needs /dev/net/tun and root, but not the kernel's sch_netem, which many kernels lack. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_HOSTS = 8, MOST_FRAMES = 4096, FRAME = 9216 };

/* Frames in transit from one host, in order. Frames beyond MOST_FRAMES are lost, as in a full switch. */
typedef struct host {
    int fd;
    unsigned char mac[6]; /* sender address of its last frame, to which later frames are delivered */
    double free_at;       /* time at which its link has sent everything                            */
    int first, n;
    struct frame {
        double due;
        int size;
        unsigned char bytes[FRAME];
    } * frames; /* [MOST_FRAMES] a ring */
} host;

static host hosts[MOST_HOSTS];
static int n_hosts;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int open_device(int number) {
    struct ifreq request;
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    memset(&request, 0, sizeof request);
    request.ifr_flags = IFF_TAP | IFF_NO_PI;
    snprintf(request.ifr_name, sizeof request.ifr_name, "wire%d", number);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request)) die("wire: /dev/net/tun");
    return fd;
}

/* Reads the frames that a host sends. If the link is busy, they are sent later. */
static void take(host *h, double delay, double bytes_per_second) {
    while (h->n < MOST_FRAMES) {
        struct frame *f = &h->frames[(h->first + h->n) % MOST_FRAMES];
        ssize_t size = read(h->fd, f->bytes, sizeof f->bytes);
        if (size < 14) return;
        double start = now();
        if (start < h->free_at) start = h->free_at;
        h->free_at = start + (double)size / bytes_per_second;
        f->due = h->free_at + delay;
        f->size = (int)size;
        memcpy(h->mac, f->bytes + 6, 6);
        h->n++;
    }
}

/* Delivers a frame to the host with its destination address or, if that is unknown, to all other hosts. */
static void deliver(const host *from, const struct frame *f) {
    const host *known = NULL;
    for (int i = 0; i < n_hosts; i++)
        if (!memcmp(hosts[i].mac, f->bytes, 6)) known = &hosts[i];
    for (host *to = hosts; to < hosts + n_hosts; to++)
        if (to != from && (!known || to == known) && write(to->fd, f->bytes, (size_t)f->size) < 0)
            continue; /* the device is down or its queue is full: the frame is lost */
}

int main(int argc, char **argv) {
    struct pollfd waits[MOST_HOSTS];
    double delay = argc == 4 ? 1e-6 * atof(argv[1]) : 0, rate = argc == 4 ? 1e6 / 8 * atof(argv[2]) : 0;
    n_hosts = argc == 4 ? atoi(argv[3]) : 0;
    if (n_hosts < 2 || n_hosts > MOST_HOSTS || rate <= 0 || delay < 0) {
        fprintf(stderr, "wire DELAY_US MBIT_S N: N hosts, 2 to %d\n", MOST_HOSTS);
        return 1;
    }
    prctl(PR_SET_TIMERSLACK, 1UL); /* otherwise the kernel may wake it 50 us late */
    for (int i = 0; i < n_hosts; i++) {
        hosts[i].fd = waits[i].fd = open_device(i + 1);
        waits[i].events = POLLIN;
        hosts[i].frames = (struct frame *)calloc(MOST_FRAMES, sizeof *hosts[i].frames);
        if (!hosts[i].frames) die("wire");
    }
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        double next = 1e18, at = now();
        for (host *h = hosts; h < hosts + n_hosts; h++) {
            for (; h->n && h->frames[h->first].due <= at; h->n--, h->first = (h->first + 1) % MOST_FRAMES)
                deliver(h, &h->frames[h->first]);
            if (h->n && h->frames[h->first].due < next) next = h->frames[h->first].due;
        }
        double left = next - now();
        struct timespec wait = {0, left > 0 ? (long)(left < 0.5 ? 1e9 * left : 500000000) : 0};
        if (ppoll(waits, (nfds_t)n_hosts, next < 1e18 ? &wait : NULL, NULL) < 0) die("wire: ppoll");
        for (host *h = hosts; h < hosts + n_hosts; h++) take(h, delay, rate);
    }
}
