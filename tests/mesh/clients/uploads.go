// What Go's client does with uploads: Expect, bodies of unknown length, kept connections.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"time"
)

const size = 3_000_000

type piped struct{ io.Reader }

func post(client *http.Client, url string, body io.Reader, expect bool) (int, string, error) {
	request, err := http.NewRequest("POST", url, body)
	if err != nil {
		return 0, "", err
	}
	if expect {
		request.Header.Set("Expect", "100-continue")
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, strings.TrimSpace(string(text)), err
}

func main() {
	whole := strings.Repeat("x", size)
	for _, address := range os.Args[1:] {
		url := "http://" + address
		client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1, ExpectContinueTimeout: 5 * time.Second}}
		ask := func(path, body string, expect bool, status int, text string) {
			// A reader that hides its length is sent in chunks.
			for _, reader := range []io.Reader{strings.NewReader(body), piped{strings.NewReader(body)}} {
				gotStatus, got, err := post(client, url+path, reader, expect)
				if err != nil || gotStatus != status || got != text {
					log.Fatalf("%s%s expect %v: %d %.100q %v", url, path, expect, gotStatus, got, err)
				}
			}
		}
		for range 3 {
			ask("/", whole, true, 200, fmt.Sprintf("ok %d", size))
			ask("/refuse", whole, true, 413, "no")
			ask("/", whole, false, 200, fmt.Sprintf("ok %d", size))
		}
		ask("/", "abc", false, 200, "ok 3")
	}
	fmt.Println("all well")
}
