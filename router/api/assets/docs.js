// The description of the API, drawn by Swagger UI (/docs) or Redoc (/redoc), whichever the page has brought.

import { ask, authorization } from "./router.js";

const place = document.getElementById("api");

/** Say in a line what went wrong. */
function say(...words) {
  const line = document.createElement("p");
  line.setAttribute("role", "alert");
  line.append(...words);
  place.replaceChildren(line);
}

function toThePage() {
  const link = document.createElement("a");
  link.href = ".";
  link.textContent = "the router's page";
  return link;
}

try {
  const description = await (await ask("openapi.json")).json();
  if (window.SwaggerUIBundle) {
    window.SwaggerUIBundle({
      spec: description,
      domNode: place,
      deepLinking: true,
      validatorUrl: null, // somebody else's service
      requestInterceptor: (request) => {
        request.headers = { ...authorization(), ...request.headers };
        return request;
      },
    });
  } else {
    window.Redoc.init(description, { disableSearch: true, hideDownloadButton: true }, place);
  }
} catch (error) {
  if (error.status === 401) say("This router asks for an API key. Give it on ", toThePage(), ", then come back in this tab.");
  else say(`The description of the API cannot be shown: ${error.message}`);
}
