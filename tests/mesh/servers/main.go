// Go's net/http: it answers before it reads, and gives up on a body that nobody reads after 256 KiB.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refuse" {
			http.Error(w, "no", http.StatusRequestEntityTooLarge)
			return
		}
		read, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "ok %d", read)
	})
	server := &http.Server{Addr: ":" + os.Args[1], IdleTimeout: time.Second}
	fmt.Fprintln(os.Stderr, server.ListenAndServe())
}
